"""The files of one checkpoint: a snapshot of an engine, and what is written from it. Nothing here is collective."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcx.artifacts import Input
from hcx.artifacts.durable import replace_directory, write_durably
from hcx.artifacts.manifest import write_manifest
from hcx.artifacts.tensors import write_safetensors
from hcx.config import Config
from hcx.engine.base import Engine
from hcx.obs import get_logger
from hcx.train.checkpoint import INDEX, TRAINER
from hcx.train.ledger import Ledger, Segment
from hcx.train.retention import LAST_GOOD, mark_last_good

log = get_logger(__name__)

Files = dict[str, dict[str, Any]]
"""File name -> `size_bytes` and `digest`."""


@dataclass(frozen=True)
class Job:
    """All that writing needs; nothing of it changes while steps go on.

    Attributes:
        step: optimizer steps done.
        final, partial: where the directory will be, and where it is written.
        file: this rank's file.
        tensors: entry -> values, of this rank.
        entries: of every rank, for the index.
        trainer: the content of `trainer.json`.
        config, inputs, counts: for the manifest.
        segment: of the ledger; on rank 0.
    """

    step: int
    final: Path
    partial: Path
    file: str
    tensors: dict[str, Tensor]
    entries: list[dict[str, Any]]
    trainer: bytes
    config: Config | dict[str, Any]
    inputs: tuple[Input, ...]
    counts: dict[str, Any]
    segment: Segment | None


def state_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"state-{rank:05d}.safetensors"


def snapshot(engine: Engine, rank: int, copy: bool) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """This rank's slices in CPU memory, and what the index says of them.

    Args:
        engine: whose state it is.
        rank: of this process.
        copy: values of their own, for steps go on while they are written.
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    for piece in engine.state_slices():
        entry = f"{piece.name}|{piece.key}|{len(tensors)}"
        tensors[entry] = piece.tensor.detach().to(device="cpu", dtype=torch.float32, copy=copy).contiguous()
        entries.append(
            {
                "name": piece.name,
                "key": piece.key,
                "global_shape": list(piece.global_shape),
                "file": state_file(rank),
                "entry": entry,
                "offset": list(piece.offset),
                "shape": list(piece.shape),
                "flat_range": None if piece.flat_range is None else list(piece.flat_range),
            }
        )
    return tensors, entries


def prepare(directory: Path, partial: Path) -> str | None:
    """An empty directory to write into, and nothing left of saves that were cut short; the problem if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in [*directory.glob(".step-*.partial"), *directory.glob(".step-*.old")]:
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def write_state(job: Job, progress: Callable[[], None]) -> Files:
    """This rank's file, on the disk."""
    if not job.tensors:
        return {}
    return {job.file: write_safetensors(job.partial / job.file, job.tensors, progress)}


def commit(job: Job, files: Mapping[str, dict[str, Any]], ledger: Ledger | None, progress: Callable[[], None]) -> None:
    """On one rank, when every rank's file is there: what is written once, the manifest last, then the rename."""
    inputs = list(job.inputs)
    if ledger is not None and job.segment is not None:
        ledger.write(job.segment)
        inputs.append(ledger.input(job.segment))
    index: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in job.entries:
        piece = dict(entry)
        name, key, shape = piece.pop("name"), piece.pop("key"), piece.pop("global_shape")
        index.setdefault(name, {}).setdefault(key, {"shape": shape, "slices": []})["slices"].append(piece)
    text = json.dumps(index, indent=1).encode()
    every = {
        **files,
        INDEX: write_durably(job.partial / INDEX, [text], progress),
        TRAINER: write_durably(job.partial / TRAINER, [job.trainer], progress),
    }
    write_manifest(job.partial, "checkpoint", job.config, inputs, job.counts, dict(sorted(every.items())), sealed=True)
    replace_directory(job.partial, job.final)
    try:
        mark_last_good(job.final, job.step)
    except OSError as error:
        # Without a pointer the newest checkpoint is taken, which is this one.
        with contextlib.suppress(OSError):
            (job.final.parent / LAST_GOOD).unlink(missing_ok=True)
        log.warning("%s is written, but the pointer to it is not: %s", job.final, error.strerror)
