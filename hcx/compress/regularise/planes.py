"""The planes of the last event: written as they are, read back at export, never quantized a second time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hcx.artifacts import Input, is_complete, new_artifact, read_manifest
from hcx.compress.run import FORMAT_VERSION, STEM
from hcx.errors import CheckpointError
from hcx.kernels import PackedWeight
from hcx.model.config import ModelConfig
from hcx.model.convert.hf import config_to_hf, copy_tokenizer, special_token_ids, write_json, write_weights
from hcx.model.load import QUANT_METHOD

KIND = "planes"


class PlaneStore:
    """A directory with the packed weights of an event, complete or absent.

    Args:
        directory: of the artifact.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def write(self, packed: Mapping[str, PackedWeight], step: int, inputs: Iterable[Input] = ()) -> None:
        """Writes the weights of the event after `step` steps; replaces those of an earlier one."""
        overwrite = is_complete(self.directory)
        with new_artifact(self.directory, KIND, {"step": step}, list(inputs), overwrite=overwrite) as artifact:
            tensors = (pair for stem, weight in packed.items() for pair in weight.to("cpu").to_tensors(stem).items())
            write_weights(artifact.path, tensors, stem=STEM)
            write_json(
                artifact.path / "modules.json",
                {"step": step, "modules": {stem: weight.describe() for stem, weight in packed.items()}},
            )
            artifact.counts = {"step": step, "modules": len(packed)}

    def read(self, step: int) -> dict[str, PackedWeight]:
        """The weights of the event after `step` steps.

        Raises:
            CheckpointError: they are not there, or are those of another step.
        """
        if not is_complete(self.directory):
            raise CheckpointError(f"{self.directory}: the planes of the last event are not there; run the last steps")
        counts = read_manifest(self.directory).counts
        if counts.get("step") != step:
            raise CheckpointError(
                f"{self.directory}: planes of step {counts.get('step')}, but the run is at step {step}; remove the "
                "directory and resume from an earlier checkpoint"
            )
        modules = json.loads((self.directory / "modules.json").read_text(encoding="utf-8"))["modules"]
        tensors: dict[str, Tensor] = {}
        for path in sorted(self.directory.glob(f"{STEM}*.safetensors")):
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 # no mapping
        return {stem: PackedWeight.from_tensors(stem, tensors, entry) for stem, entry in modules.items()}


def write_packed_model(
    directory: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    packed: Mapping[str, PackedWeight],
    tokenizer: str | Path | None,
    dtype: torch.dtype,
    encoded: Mapping[str, tuple[Tensor, Mapping[str, Any]]] | None = None,
) -> None:
    """Fills a model directory with planes as they are; the other weights are stored in a type.

    Args:
        directory: exists; files are added.
        config: the decoder's.
        tensors: (canonical name, full fp32 master), of every parameter.
        packed: module -> its planes.
        tokenizer: a directory whose tokenizer files are copied.
        dtype: of the weights without planes.
        encoded: module -> (codes, entry `encoding`), for those whose planes are stored as code words.

    Raises:
        CheckpointError: a master is not, bit for bit, what its planes stand for.
    """
    special: dict[str, int | None] = {}
    if tokenizer is not None:
        copy_tokenizer(tokenizer, directory)
        special = special_token_ids(tokenizer)
    encoded = encoded or {}
    write_weights(directory, _stored(tensors, packed, dtype, encoded), stem=STEM)
    index = directory / f"{STEM}.safetensors.index.json"
    first = next(iter(packed.values()))
    write_json(
        directory / "config.json",
        {
            **config_to_hf(config, dtype, **special),
            "quantization_config": {
                "quant_method": QUANT_METHOD,
                "version": FORMAT_VERSION,
                "bits": first.bits,
                "group_size": first.group_size,
                "weight_file": index.name if index.is_file() else f"{STEM}.safetensors",
                "modules": {
                    stem: weight.describe() | ({"encoding": encoded[stem][1]} if stem in encoded else {})
                    for stem, weight in packed.items()
                },
            },
        },
    )
    write_json(
        directory / "generation_config.json",
        {"_from_model_config": True, **{name: value for name, value in special.items() if value is not None}},
    )


def _stored(
    tensors: Iterable[tuple[str, Tensor]],
    packed: Mapping[str, PackedWeight],
    dtype: torch.dtype,
    encoded: Mapping[str, tuple[Tensor, Mapping[str, Any]]],
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        stem = name.removesuffix(".weight")
        weight = packed.get(stem)
        if weight is None:
            yield name, tensor.to(dtype)
            continue
        if not torch.equal(weight.dequantize(torch.float32).cpu(), tensor.float().cpu()):
            raise CheckpointError(
                f"{name}: the weight is not what the planes of the last event stand for; it was changed after the event"
            )
    for stem, weight in packed.items():
        stored = weight.to_tensors(stem)
        if stem in encoded:
            del stored[f"{stem}.planes"]
            stored[f"{stem}.codes"] = encoded[stem][0]
        yield from stored.items()
