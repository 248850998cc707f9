"""Unfinished compressions: one file per layer beside the directory to be made, so that a killed command goes on.

A layer's file is written and forced to the disk, then its record: a record that is there vouches for a whole file. On
the way back each file is compared with the digest in its record. Nothing of the directory to be made exists before all
layers do.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from hcx.artifacts import digest_file, digest_json
from hcx.artifacts.durable import sync_directory, write_atomically
from hcx.artifacts.tensors import write_safetensors
from hcx.errors import CheckpointError
from hcx.obs import get_logger

log = get_logger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)


class WorkDirectory:
    """The finished layers of a compression that may have been interrupted.

    Args:
        path: the directory; made if it is not there.
        identity: what the work belongs to: the source, the plan, the format. Work of another identity is not touched.

    Raises:
        CheckpointError: another process is at it, or it holds unfinished work of another plan or model.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(f"{path}: another hcx compress is writing there") from None
            self._check(identity)
        except BaseException:
            os.close(self._lock)
            raise

    def _check(self, identity: Mapping[str, Any]) -> None:
        digest = digest_json(dict(identity))
        stated = self.path / "identity.json"
        if not stated.is_file():
            for left in self.path.glob("layer-*"):
                left.unlink()
            write_atomically(stated, json.dumps({"digest": digest, **identity}, indent=1).encode())
            return
        try:
            found = json.loads(stated.read_text(encoding="utf-8")).get("digest")
        except (ValueError, AttributeError):
            found = None
        if found != digest:
            raise CheckpointError(
                f"{self.path}: unfinished work of another plan or model; run that command again to finish it, or "
                "remove this directory"
            )

    def layer(self, number: int) -> Path:
        """The file of a layer."""
        return self.path / f"layer-{number:05d}.safetensors"

    def _record(self, number: int) -> Path:
        return self.path / f"layer-{number:05d}.json"

    def finished(self, number: int) -> dict[str, Any] | None:
        """What was recorded with a layer, or None if it is not there or not whole."""
        try:
            record: dict[str, Any] = json.loads(self._record(number).read_text(encoding="utf-8"))
            path = self.layer(number)
            if path.stat().st_size == record["size_bytes"] and digest_file(path) == record["digest"]:
                return record
            log.warning("%s does not match its digest; the layer is compressed again", path)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def finish(self, number: int, tensors: Mapping[str, Tensor], outcome: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a layer and its record.

        Raises:
            CheckpointError: the disk is full; what is finished stays.
        """
        with told_if_full(self.path):
            self._record(number).unlink(missing_ok=True)
            stored = write_safetensors(self.layer(number), tensors)
            record = {**outcome, **stored}
            write_atomically(self._record(number), json.dumps(record).encode())
        return record

    def close(self) -> None:
        """Lets others in; what is finished stays."""
        os.close(self._lock)

    def remove(self) -> None:
        """Removes the work: it is done, or of no more use."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        sync_directory(self.path.parent)


@contextmanager
def told_if_full(work: Path) -> Iterator[None]:
    """Makes a full disk the user's to mend, and says how.

    Raises:
        CheckpointError: in the place of the OSError of a full disk or an exhausted quota.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(work.parent).free
        raise DiskFull(
            f"{work.parent}: the disk is full ({free / 1e6:.0f} MB free); make room and run the same command again: "
            f"it goes on from {work.name}"
        ) from None


class DiskFull(CheckpointError):
    """There is no room for the next file; what was finished stays."""


def in_layers(names: Sequence[str]) -> list[list[str]]:
    """Canonical names in order, cut where the block changes: the embedding, each block, what comes after them."""
    layers: list[list[str]] = []
    before: str | None = None
    for name in names:
        block = name.split(".")[2] if name.startswith("model.layers.") else "ends"
        # Embedding and output are large enough to be on their own.
        if block == "ends" or block != before:
            layers.append([])
        layers[-1].append(name)
        before = block
    return layers
