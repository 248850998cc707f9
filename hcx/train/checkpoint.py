"""Checkpoints in the canonical layout: slices of canonical tensors, whatever engine and layout wrote them.

    last-good.json              which checkpoint to go on from
    step-000100/
      state-00000.safetensors ...   one per rank that holds state: flat fp32 slices
      index.json                    canonical name -> key -> shape and slices (file, entry, offset, shape, flat range)
      trainer.json                  step, tokens, engine scalars, transforms, position in the data, left-out steps
      manifest.json                 written last, sealed; a directory without one is never selected

Any engine at any world size reads full tensors from it (`CheckpointReader`); nothing is ever unpickled.
torch's distributed checkpointing is not used: its safetensors storage holds whole tensors only, and its own format
keeps metadata as a pickle. Writing is in `hcx.train.saving`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hcx.artifacts import NewerFormat, digest_file, is_complete, read_manifest
from hcx.dist import process_environment
from hcx.errors import CheckpointError, HcxError
from hcx.obs import get_logger
from hcx.train.retention import last_good

log = get_logger(__name__)

INDEX = "index.json"
TRAINER = "trainer.json"
_STEP = re.compile(r"^step-(\d+)$")


class CheckpointReader:
    """Full canonical tensors of a checkpoint (`StateReader`).

    Sizes of all files and the digests of the JSON files are checked always.

    Args:
        directory: `.../step-NNNNNN`.
        digests: check the digests of the tensor files too, which reads them once.

    Raises:
        CheckpointError: the directory is not a complete checkpoint, or a file is damaged; the file is named.
        NewerFormat: a later hcx wrote it.
    """

    def __init__(self, directory: str | Path, digests: bool = False) -> None:
        self.directory = Path(directory)
        try:
            self.manifest = read_manifest(self.directory, "checkpoint")
        except NewerFormat:
            raise
        except HcxError as error:
            raise CheckpointError(str(error)) from None
        for name in self.manifest.files:
            self._check(name, digest=digests or name.endswith(".json"))
        try:
            self._index = json.loads((self.directory / INDEX).read_text(encoding="utf-8"))
            self.trainer_state: dict[str, Any] = json.loads((self.directory / TRAINER).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.directory}: damaged checkpoint ({error})") from None
        self._files: dict[str, Any] = {}

    def _check(self, name: str, digest: bool) -> None:
        path, entry = self.directory / name, self.manifest.files[name]
        try:
            whole = path.is_file() and path.stat().st_size == entry["size_bytes"]
            if whole and digest and digest_file(path) != entry["digest"]:
                raise CheckpointError(
                    f"{path}: does not match its digest, so it is damaged; resume from an earlier checkpoint"
                )
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        if not whole:
            raise CheckpointError(f"{path}: missing or cut short; resume from an earlier checkpoint")

    def verify(self, share: int = 0, of: int = 1) -> None:
        """Checks the digests of every `of`-th file, beginning with number `share`, so that ranks can share the work.

        Raises:
            CheckpointError: naming the damaged file.
        """
        for name in sorted(self.manifest.files)[share::of]:
            self._check(name, digest=True)

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

    def shape(self, name: str, key: str) -> tuple[int, ...]:
        """The full shape of what is stored under a key of a name."""
        return tuple(self._index[name][key]["shape"])

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


def _candidates(directory: str | Path, up_to: int | None) -> Iterator[Path]:
    """The last good checkpoint, then the others, newest first."""
    found = [path for step, path in reversed(checkpoints(directory)) if up_to is None or step <= up_to]
    pointed = last_good(directory)
    if pointed in found:
        found.remove(pointed)
        yield pointed
    yield from found


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The last good checkpoint, else the newest that can be read, or None; damaged ones are passed over, named.

    Raises:
        NewerFormat: a later hcx wrote it; passing over it would lose what it holds.
    """
    for path in _candidates(directory, None):
        try:
            CheckpointReader(path)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            continue
        return path
    return None


def find_checkpoint(directory: str | Path, up_to: int | None = None) -> CheckpointReader | None:
    """The checkpoint to go on from, every digest checked; collective: ranks share the checking and agree.

    Args:
        directory: holds the run's checkpoints.
        up_to: only those of this step or earlier.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
        NewerFormat: a later hcx wrote the checkpoint.
    """
    damaged = []
    for path in _candidates(directory, up_to):
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            damaged.append(str(error))
    if damaged:
        listed = "\n  ".join(damaged)
        raise CheckpointError(
            f"{directory}: no checkpoint is whole:\n  {listed}\n"
            "bring a whole copy back, or start anew in another directory (out=DIR)"
        )
    return None


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """A reader after every digest was checked; collective, and an error of any rank is everyone's.

    Raises:
        CheckpointError: naming the damaged file.
        NewerFormat: a later hcx wrote it.
    """
    rank, world_size, _ = process_environment()
    problem: str | None = None
    try:
        reader = CheckpointReader(path)
        reader.verify(rank, world_size)
    except CheckpointError as error:
        problem = str(error)
    if world_size > 1:
        problems: list[str | None] = [None] * world_size
        torch.distributed.all_gather_object(problems, problem)
        problem = next((found for found in problems if found is not None), None)
    if problem is not None:
        raise CheckpointError(problem)
    return reader
