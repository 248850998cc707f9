"""Checkpoints in the canonical layout: slices of canonical tensors, whatever engine and layout wrote them.

    step-000100/
      state-00000.safetensors ...   one per rank that holds state: flat fp32 slices
      index.json                    canonical name -> key -> shape and slices (file, entry, offset, shape, flat range)
      trainer.json                  step, tokens, engine scalars, transforms, sample range
      manifest.json                 written last; a directory without one is never selected

Any engine at any world size reads full tensors from it (`CheckpointReader`); nothing is ever unpickled.
torch's distributed checkpointing is not used: its safetensors storage holds whole tensors only, and its own format
keeps metadata as a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hcx.artifacts import Input, is_complete, read_manifest
from hcx.artifacts.manifest import write_manifest
from hcx.config import Config
from hcx.dist import process_environment
from hcx.engine.base import Engine
from hcx.errors import CheckpointError, HcxError
from hcx.obs import get_logger

log = get_logger(__name__)

INDEX = "index.json"
TRAINER = "trainer.json"
_STEP = re.compile(r"^step-(\d+)$")


def save_checkpoint(
    directory: str | Path,
    step: int,
    engine: Engine,
    trainer_state: Mapping[str, Any],
    config: Config | Mapping[str, Any] | None = None,
    inputs: Iterable[Input] = (),
    counts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `directory/step-NNNNNN`; collective. A kill at any moment leaves the earlier checkpoints whole.

    Args:
        directory: holds the run's checkpoints, on a file system that all ranks share.
        step: optimizer steps done.
        engine: whose state is written.
        trainer_state: JSON-serialisable.
        config, inputs, counts: for the manifest.
    """
    directory = Path(directory)
    final = directory / f"step-{step:06d}"
    partial = directory / f".{final.name}.partial"
    rank, world_size, _ = process_environment()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier(world_size)
    entries = _write_rank(partial, rank, engine)
    gathered: list[list[dict[str, Any]]] = [entries]
    if world_size > 1:
        gathered = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(gathered, entries)
    scalars = engine.scalars()
    if rank == 0:
        index: dict[str, dict[str, dict[str, Any]]] = {}
        for entry in (entry for part in gathered for entry in part):
            name, key, shape = entry.pop("name"), entry.pop("key"), entry.pop("global_shape")
            index.setdefault(name, {}).setdefault(key, {"shape": shape, "slices": []})["slices"].append(entry)
        (partial / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        state = {**trainer_state, "step": step, "engine": scalars}
        (partial / TRAINER).write_text(json.dumps(state, ensure_ascii=False, indent=1), encoding="utf-8")
        write_manifest(
            partial,
            "checkpoint",
            config if isinstance(config, Config) else dict(config or {}),
            inputs,
            {"step": step, **(counts or {})},
        )
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    _barrier(world_size)
    return final


def _write_rank(partial: Path, rank: int, engine: Engine) -> list[dict[str, Any]]:
    file = f"state-{rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    entries = []
    for piece in engine.state_slices():
        entry = f"{piece.name}|{piece.key}|{len(tensors)}"
        tensors[entry] = piece.tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
        entries.append(
            {
                "name": piece.name,
                "key": piece.key,
                "global_shape": list(piece.global_shape),
                "file": file,
                "entry": entry,
                "offset": list(piece.offset),
                "shape": list(piece.shape),
                "flat_range": None if piece.flat_range is None else list(piece.flat_range),
            }
        )
    if tensors:
        save_file(tensors, partial / file)
    return entries


def _barrier(world_size: int) -> None:
    if world_size > 1:
        torch.distributed.barrier()


class CheckpointReader:
    """Full canonical tensors of a checkpoint (`StateReader`).

    Raises:
        CheckpointError: the directory is not a complete checkpoint, or a file is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            self.manifest = read_manifest(self.directory, "checkpoint")
            self._index = json.loads((self.directory / INDEX).read_text(encoding="utf-8"))
            self.trainer_state: dict[str, Any] = json.loads((self.directory / TRAINER).read_text(encoding="utf-8"))
        except HcxError as error:
            raise CheckpointError(str(error)) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.directory}: damaged checkpoint ({error})") from None
        for name, entry in self.manifest.files.items():
            path = self.directory / name
            if not path.is_file() or path.stat().st_size != entry["size_bytes"]:
                raise CheckpointError(f"{path}: missing or cut short; resume from an earlier checkpoint")
        self._files: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.trainer_state["step"])

    def names(self) -> list[str]:
        """Canonical parameter names."""
        return list(self._index)

    def keys(self, name: str) -> list[str]:
        """Keys stored for a name."""
        return list(self._index[name])

    def read(self, name: str, key: str) -> Tensor:
        """One full canonical tensor, fp32, CPU."""
        try:
            stored = self._index[name][key]
        except KeyError:
            raise CheckpointError(f"{self.directory}: holds no {key} of {name}") from None
        full = torch.empty(stored["shape"], dtype=torch.float32)
        covered = 0
        for piece in stored["slices"]:
            values = self._tensor(piece["file"], piece["entry"])
            where = tuple(slice(o, o + n) for o, n in zip(piece["offset"], piece["shape"], strict=True))
            if piece["flat_range"] is None:
                full[where] = values
            else:
                block = full[where].contiguous()
                block.view(-1)[slice(*piece["flat_range"])] = values
                full[where] = block
            covered += values.numel()
        if covered != full.numel():
            raise CheckpointError(
                f"{self.directory}: {key} of {name} is incomplete: {covered} of {full.numel()} values"
            )
        return full

    def _tensor(self, file: str, entry: str) -> Tensor:
        try:
            if file not in self._files:
                self._files[file] = safe_open(self.directory / file, framework="pt")
            found: Tensor = self._files[file].get_tensor(entry)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.directory / file}: damaged ({error})") from None
        return found


def checkpoints(directory: str | Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint, oldest first."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP.match(path.name))]
    return sorted((step, path) for step, path in found if is_complete(path))


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest complete checkpoint that can be read, or None; damaged ones are passed over with a warning."""
    for _, path in reversed(checkpoints(directory)):
        try:
            CheckpointReader(path)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            continue
        return path
    return None


def remove_old_checkpoints(directory: str | Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints; the manifest goes first, so a half-removed one is never chosen."""
    for _, path in checkpoints(directory)[:-keep] if keep > 0 else []:
        (path / "manifest.json").unlink()
        shutil.rmtree(path)
