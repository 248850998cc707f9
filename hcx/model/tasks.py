"""Task files of AlphaTuning: the scales (or offsets) of one task, for the planes of one binary-coded model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hcx.artifacts.tensors import write_safetensors
from hcx.errors import CheckpointError
from hcx.kernels import PackedWeight
from hcx.model.convert.hf import write_json
from hcx.model.parts.scales import TrainedScales, trained_names

TASK_CONFIG, TASK_WEIGHTS = "task.json", "task.safetensors"
VERSION = 1


@dataclass(frozen=True)
class ScaleTask:
    """What one task changes of a model.

    Attributes:
        train: which scales.
        tensors: `STEM.scales.I` and `STEM.offset` -> `[out, groups]` fp32.
        base: the model that it was trained on, for people.
        directory: where it came from.
    """

    train: TrainedScales
    tensors: Mapping[str, Tensor]
    base: str
    directory: Path

    @property
    def stems(self) -> frozenset[str]:
        """Module paths that it changes."""
        return frozenset(map(stem_of, self.tensors))

    def merged(self, stem: str, packed: PackedWeight) -> PackedWeight:
        """A weight with the task's scales; its planes are not copied.

        Scales may have become negative or lost their order, so planes must not be chosen anew for them.

        Raises:
            CheckpointError: the weight has other groups or fewer planes.
        """
        scales, offset = packed.scales, packed.offset
        if stem not in self.stems:
            return packed
        scales = scales.float().clone()
        expected = tuple(scales.shape[1:])
        for name in trained_names(self.train, packed.bits):
            values = self.tensors.get(f"{stem}.{name}")
            if values is None or tuple(values.shape) != expected:
                found = "is missing" if values is None else f"has shape {tuple(values.shape)}, not {expected}"
                raise CheckpointError(
                    f"{self.directory}: {stem}.{name} {found}; give the model that the task was trained on "
                    f"({self.base})"
                )
            values = values.to(scales.device)
            if name == "offset":
                offset = values.float()
            else:
                scales[int(name.rpartition(".")[2])] = values
        return replace(packed, scales=scales, offset=offset, sorted=False)


def is_task(directory: str | Path) -> bool:
    """Whether a directory holds a task file."""
    return (Path(directory) / TASK_CONFIG).is_file()


def write_task(directory: str | Path, task: ScaleTask) -> int:
    """Fills a directory, which exists; returns the bytes of the weight file."""
    directory = Path(directory)
    path = directory / TASK_WEIGHTS
    write_safetensors(path, {name: task.tensors[name].float().cpu().contiguous() for name in sorted(task.tensors)})
    write_json(
        directory / TASK_CONFIG,
        {
            "method": "alphatuning",
            "version": VERSION,
            "train": task.train,
            "base": task.base,
            "numbers": sum(tensor.numel() for tensor in task.tensors.values()),
        },
    )
    return path.stat().st_size


def read_task(directory: str | Path) -> ScaleTask:
    """Reads a task file.

    Raises:
        CheckpointError: a file is missing or damaged, or it is of another version.
    """
    directory = Path(directory)
    try:
        stated = json.loads((directory / TASK_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / TASK_WEIGHTS)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: not a task directory, {Path(error.filename or '').name} is missing"
        ) from None
    except (ValueError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory}: damaged or cut short ({error})") from None
    if stated.get("method") != "alphatuning" or stated.get("version") != VERSION:
        raise CheckpointError(
            f"{directory / TASK_CONFIG}: method {stated.get('method')!r}, version {stated.get('version')}; this hcx "
            f"reads 'alphatuning', version {VERSION}"
        )
    if stated.get("train") not in get_args(TrainedScales):
        raise CheckpointError(
            f"{directory / TASK_CONFIG}: train = {stated.get('train')!r}; allowed: {', '.join(get_args(TrainedScales))}"
        )
    bad = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise CheckpointError(f"{directory / TASK_WEIGHTS}: {bad} holds values that are not finite")
    return ScaleTask(cast(TrainedScales, stated["train"]), tensors, str(stated.get("base", "")), directory)


def stem_of(name: str) -> str:
    """The module path of `STEM.scales.0` or `STEM.offset`."""
    return name.removesuffix(".offset") if name.endswith(".offset") else name.rpartition(".scales.")[0]


def is_task_name(name: str) -> bool:
    """Whether a canonical parameter name is one of a task's scales."""
    return name.endswith(".offset") or ".scales." in name
