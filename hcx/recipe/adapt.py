"""Runs that train an adapter (low-rank updates, or scales): what goes on the base, and what is written at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from hcx.artifacts import Input, artifact_input, is_complete, new_artifact
from hcx.compress.alphatuning import AlphaTuning, AlphaTuningConfig
from hcx.errors import ConfigError
from hcx.model.adapters import LoRA
from hcx.model.convert.hf import copy_tokenizer, export_hf
from hcx.model.convert.peft import read_adapter, write_adapter
from hcx.model.decoder import Decoder
from hcx.model.load import ModelFiles, use_packed
from hcx.model.parts.linear import LinearPart
from hcx.model.parts.sources import DenseSource, LinearBlock
from hcx.model.tasks import read_task, write_task
from hcx.model.transforms import ModelTransform, TransformContext
from hcx.obs import get_logger
from hcx.recipe.convert import DTYPES, CheckpointModel
from hcx.recipe.data import RunData
from hcx.recipe.train import TrainRecipe
from hcx.train import CheckpointReader

log = get_logger(__name__)


class PackedBase(ModelTransform):
    """Keeps the binary-coded weights of a model directory packed, frozen, in place of their dense form.

    Args:
        directory: the model.

    The decoder is loaded dense first, so a rank's peak memory at the start is that of the dense model.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def apply(self, chunk: nn.Module, context: TransformContext) -> None:
        """See `ModelTransform.apply`."""
        if context.topology.tp_size > 1:
            raise ConfigError(
                f"engine.tensor_parallel = {context.topology.tp_size}: the binary-coded weights of {self._directory} "
                "are kept whole under an adapter; use engine.tensor_parallel = 1, or hcx convert the model --to hf"
            )
        with ModelFiles(self._directory) as files:
            for part in dict.fromkeys(cast(Decoder, chunk).linears().values()):
                use_packed(part, files, part.parts.device, "reference", _Rows(part), differentiable=True)


class _Rows:
    """A block of a dense part as a parameter of its own."""

    def __init__(self, part: LinearPart) -> None:
        self._weight = cast(DenseSource, part.source).weight

    def __call__(self, block: LinearBlock) -> nn.Parameter:
        return nn.Parameter(self._weight.detach()[slice(*block.rows)].clone(), requires_grad=False)


def adapter_transforms(recipe: TrainRecipe) -> list[ModelTransform]:
    """What an adapter's run does to the loaded model; nothing for other runs.

    Raises:
        CheckpointError: the adapter to start from, or the base, cannot be read.
    """
    if recipe.adapter is None or recipe.init_from is None:
        return []
    if isinstance(recipe.adapter, AlphaTuningConfig):
        start = None if recipe.adapter.init_from is None else read_task(recipe.adapter.init_from)
        return [AlphaTuning(recipe.adapter, recipe.init_from, start)]
    initial = None if recipe.adapter.init_from is None else read_adapter(recipe.adapter.init_from)
    lora = LoRA(recipe.adapter, recipe.seed, initial)
    with ModelFiles(recipe.init_from) as files:
        is_packed = bool(files.modules)
    return [PackedBase(recipe.init_from), lora] if is_packed else [lora]


def export_adapter_run(
    recipe: TrainRecipe, out: Path, data: RunData, checkpoint: Path, inputs: Sequence[Input]
) -> None:
    """Writes `OUT/adapter`, in PEFT's form or as a task file, and, unless the base is packed, `OUT/model` with the
    low-rank updates merged in."""
    reader = CheckpointReader(checkpoint)
    model = CheckpointModel(reader)
    made_from = [artifact_input("checkpoint", checkpoint), *inputs]
    counts = {
        "steps": reader.step,
        "tokens": reader.trainer_state.get("tokens", 0),
        "tokenizer_digest": data.tokenizer_digest,
        **({"conversations": dict(data.counts)} if data.counts else {}),
    }
    target = out / "adapter"
    with new_artifact(target, "adapter", recipe, made_from, overwrite=is_complete(target)) as artifact:
        if isinstance(recipe.adapter, AlphaTuningConfig):
            size = write_task(artifact.path, model.task)
            numbers = sum(tensor.numel() for tensor in model.task.tensors.values())
            counts |= {"trained_numbers": numbers, "task_file_bytes": size}
        else:
            write_adapter(artifact.path, model.adapter, str(Path(recipe.init_from or "").resolve()))
            copy_tokenizer(data.tokenizer_of, artifact.path)
            data.write_tokenizer(artifact.path)
        artifact.counts = counts
    log.info("adapter %s", target)
    if not recipe.export.merged:
        return
    if model.base_is_packed:
        log.info("no merged model: %s is binary-coded, and stays so under the adapter", recipe.init_from)
        return
    target = out / "model"
    with new_artifact(target, "model", recipe, made_from, overwrite=is_complete(target)) as artifact:
        dtype: torch.dtype = DTYPES[recipe.export.dtype]
        export_hf(artifact.path, recipe.model, model.tensors(), data.tokenizer_of, dtype)
        data.write_tokenizer(artifact.path)
        artifact.counts = counts
    log.info("model %s", target)
