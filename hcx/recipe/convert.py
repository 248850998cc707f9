"""Checkpoints, model directories and adapters to Hugging Face and PEFT directories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hcx.artifacts import artifact_input, is_complete, new_artifact, read_manifest
from hcx.artifacts.manifest import MANIFEST
from hcx.compress.alphatuning import AlphaTuningConfig, task_of
from hcx.compress.flexor import FlexorConfig, packed_of
from hcx.compress.regularise import matrix_shapes
from hcx.data.shards import TOKENIZER_FOLDER
from hcx.errors import CheckpointError, ConfigError
from hcx.model.adapters import Adapter, LoRAConfig
from hcx.model.config import ModelConfig
from hcx.model.convert.gguf_file import SUFFIX, is_gguf
from hcx.model.convert.hf import copy_tokenizer, export_hf
from hcx.model.convert.peft import read_adapter, write_adapter
from hcx.model.load import ModelFiles, tensor_names
from hcx.model.tasks import ScaleTask, is_task
from hcx.tokenizer import Tokenizer
from hcx.tokenizer.codec import CHAT_TEMPLATE_FILE
from hcx.train import CheckpointReader

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def save_chat_format(tokenizer: Tokenizer, directory: Path) -> None:
    """Replaces the chat format of a directory that already has the tokenizer's other files."""
    (directory / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
    tokenizer.save(directory)


class CheckpointModel:
    """The model that a checkpoint stands for: its masters, with the adapter of an adapter's run merged in.

    Args:
        reader: the checkpoint.

    Raises:
        CheckpointError: the base of an adapter's run is needed and is not there.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        stated = reader.manifest.config
        # Of a run in stages, the base of the rotary embedding is that of the stage it was in.
        changed = reader.trainer_state.get("model", {})
        self.config = ModelConfig.model_validate(stated["model"] | changed, strict=False)
        self._held = set(reader.names())
        self._stated = stated
        self._base = str(stated.get("init_from") or "")

    @property
    def has_adapter(self) -> bool:
        """Whether it was written by a run that trained low-rank updates."""
        return self._kind == "lora"

    @property
    def _kind(self) -> str | None:
        stated = self._stated.get("adapter")
        return None if stated is None else str(stated.get("kind", "lora"))

    @property
    def task(self) -> ScaleTask:
        """The scales of a run that trained those."""
        config = AlphaTuningConfig.model_validate(self._stated["adapter"], strict=False)
        return task_of(
            config, lambda name: self._reader.read(name, "master"), self._held, self._base, self._reader.directory
        )

    @property
    def adapter(self) -> Adapter:
        """The low-rank updates of an adapter's run."""
        config = LoRAConfig.model_validate(self._stated["adapter"], strict=False)
        names = [name for name in self._held if ".lora_" in name]
        tensors = {name: self._reader.read(name, "master") for name in sorted(names)}
        return Adapter(config.rank, config.alpha, config.targets, tensors, self._reader.directory)

    @property
    def base(self) -> str:
        """The model directory that the run started from, empty for none."""
        return self._base

    @property
    def base_is_packed(self) -> bool:
        """Whether the base's weights are binary-coded: the checkpoint then holds the rest only."""
        return self._stated.get("flexor") is None and not set(tensor_names(self.config)) <= self._held

    @property
    def tokenizer(self) -> Path | None:
        """A directory with the tokenizer's files, as far as the run's inputs are still where they were."""
        data = self._stated.get("data", {})
        shards = Path(data.get("shards") or "")
        if data.get("shards") and is_complete(shards):
            return shards / TOKENIZER_FOLDER
        other = Path(data.get("tokenizer") or self._base or "")
        return other if (other / "tokenizer.json").is_file() else None

    def write_tokenizer(self, directory: Path) -> None:
        """Copies the tokenizer's files, with the chat format that the run trained."""
        if self.tokenizer is None:
            return
        copy_tokenizer(self.tokenizer, directory)
        preamble = self._stated.get("data", {}).get("preamble")
        if preamble:
            save_chat_format(Tokenizer.load(self.tokenizer).with_preamble(preamble), directory)

    def _expanded(self) -> Iterator[tuple[str, Tensor]]:
        """Of a FleXOR run: dense weights, expanded from their keys."""
        config = FlexorConfig.model_validate(self._stated["flexor"], strict=False)
        for name in tensor_names(self.config):
            if name in self._held:
                yield name, self._reader.read(name, "master")
                continue
            stem = name.removesuffix(".weight")
            mine = {n: self._reader.read(n, "master") for n in self._held if n.startswith(f"{stem}.")}
            packed, _ = packed_of(config, mine, {stem: matrix_shapes(self.config)[stem]})
            yield name, packed[stem].dequantize()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, full tensor), one at a time."""
        if self._stated.get("flexor") is not None:
            yield from self._expanded()
            return
        adapter = self.adapter if self.has_adapter else None
        files = ModelFiles(self._base) if self.base_is_packed else None
        task = self.task if self._kind == "alphatuning" else None
        for name in tensor_names(self.config):
            stem = name.removesuffix(".weight")
            if task is not None and files is not None and stem in task.stems:
                yield name, task.merged(stem, files.packed(stem)).dequantize()
                continue
            weight = files.weight(name) if files and name not in self._held else self._reader.read(name, "master")
            yield name, weight if adapter is None else adapter.merged(name, weight)


def convert_model(
    source: Path,
    destination: Path,
    dtype: torch.dtype,
    manifest: bool = True,
    adapter: Path | None = None,
) -> None:
    """Writes a full-precision model directory.

    Args:
        source: a model directory (full precision or BCQ), a GGUF file, or a checkpoint directory.
        destination: must not exist.
        dtype: of the written weights.
        manifest: keep `manifest.json` in the result.
        adapter: a directory of low-rank updates to merge into a model directory's weights.

    Raises:
        CheckpointError: the source is neither, or the adapter does not fit it.
    """
    if is_gguf(source) or (source / "config.json").is_file():
        _convert_directory(source, destination, dtype, adapter)
    elif not _is_checkpoint(source):
        raise CheckpointError(
            f"{source}: neither a model directory (config.json), nor a GGUF file (*{SUFFIX}), nor a complete checkpoint"
        )
    elif adapter is not None:
        raise ConfigError(f"--adapter goes with a model directory, and {source} is a checkpoint")
    else:
        model = CheckpointModel(CheckpointReader(source))
        inputs = [artifact_input("checkpoint", source)]
        with new_artifact(destination, "model", {"dtype": str(dtype)}, inputs) as artifact:
            export_hf(artifact.path, model.config, model.tensors(), model.tokenizer, dtype)
            model.write_tokenizer(artifact.path)
    if not manifest:
        (destination / MANIFEST).unlink()


def _convert_directory(source: Path, destination: Path, dtype: torch.dtype, adapter: Path | None) -> None:
    inputs = [artifact_input("model", source)]
    if adapter is not None and is_task(adapter):
        raise ConfigError(
            f"--adapter {adapter}: a task's scales belong to the planes of its model, and convert writes dense "
            "weights; give both to generate, eval or serve, or convert the run's checkpoint"
        )
    updates = None if adapter is None else read_adapter(adapter)
    with ModelFiles(source) as files:
        names = tensor_names(files.config)
        if adapter is not None and updates is not None:
            _check_fits(updates, files, names)
            inputs.append(artifact_input("adapter", adapter))
        weights = ((name, files.weight(name)) for name in names)
        tensors = weights if updates is None else ((n, updates.merged(n, weight)) for n, weight in weights)
        with new_artifact(destination, "model", {"dtype": str(dtype)}, inputs) as artifact:
            tokenizer = artifact.path if files.write_tokenizer(artifact.path) else None
            export_hf(artifact.path, files.config, tensors, tokenizer, dtype)
            if adapter is not None:
                # Its chat format is the one that was trained.
                copy_tokenizer(adapter, artifact.path)


def _is_checkpoint(source: Path) -> bool:
    return is_complete(source) and read_manifest(source).kind == "checkpoint"


def _check_fits(updates: Adapter, files: ModelFiles, names: list[str]) -> None:
    for name in sorted(updates.tensors):
        stem, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        if f"{stem}.weight" not in names:
            raise CheckpointError(f"{updates.directory}: adapts {stem}, which {files.directory} does not have")
        shape = tuple(files.weight(f"{stem}.weight").shape)
        wanted = (updates.rank, shape[1]) if factor == "A" else (shape[0], updates.rank)
        if tuple(updates.tensors[name].shape) != wanted:
            raise CheckpointError(
                f"{updates.directory}: {name} has shape {tuple(updates.tensors[name].shape)}, {files.directory} needs "
                f"{wanted}; give the model that the adapter was made for"
            )


def convert_adapter(source: Path, destination: Path, dtype: torch.dtype) -> None:
    """Writes the adapter of a checkpoint in PEFT's form.

    Raises:
        CheckpointError: the source is no checkpoint of a run that trained an adapter.
    """
    if not _is_checkpoint(source):
        raise CheckpointError(
            f"{source}: not a complete checkpoint; --to peft writes the adapter of a run's checkpoint"
        )
    model = CheckpointModel(CheckpointReader(source))
    if not model.has_adapter:
        raise CheckpointError(f"{source}: the run that wrote this checkpoint trained no low-rank adapter; use --to hf")
    inputs = [artifact_input("checkpoint", source)]
    with new_artifact(destination, "adapter", {"dtype": str(dtype)}, inputs) as artifact:
        write_adapter(artifact.path, model.adapter, str(Path(model.base).resolve()), dtype)
        model.write_tokenizer(artifact.path)
