"""The ledger of a run: loss and sample ids of every step that led to a checkpoint.

    OUT/ledger/000001-000100-3f74550ddd5c.jsonl

A segment holds the steps from one checkpoint to the next. Its first line names the segment before it by digest, and a
checkpoint's manifest names the last one among its inputs: so from any checkpoint the whole history of its weights can
be read and proved. Segments are named by their content and never changed. What a step that was gone back over did is
not in it (that is an event in `metrics.jsonl`): the ledger is the course that led to the weights, nothing beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcx.artifacts import Input, digest_bytes, read_manifest
from hcx.artifacts.durable import write_atomically
from hcx.errors import CheckpointError

FOLDER = "ledger"
ROLE = "ledger"


def as_ranges(sample_ids: Iterable[int]) -> list[list[int]]:
    """Numbers as `[first, last + 1]` ranges, in order: `0 1 2 7` -> `[[0, 3], [7, 8]]`."""
    ranges: list[list[int]] = []
    for sample in sample_ids:
        if ranges and ranges[-1][1] == sample:
            ranges[-1][1] = sample + 1
        else:
            ranges.append([sample, sample + 1])
    return ranges


@dataclass(frozen=True)
class Segment:
    """A finished piece of the ledger.

    Attributes:
        file: its name.
        data: its bytes.
        rows: how many steps it holds.
    """

    file: str
    data: bytes
    rows: int

    @property
    def digest(self) -> str:
        """Of the bytes."""
        return digest_bytes(self.data)


class Ledger:
    """Collects rows and seals them at checkpoints.

    Args:
        run: the run's directory.
    """

    def __init__(self, run: str | Path) -> None:
        self.directory = Path(run) / FOLDER
        self._rows: list[dict[str, Any]] = []
        self._previous: dict[str, str] | None = None

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """A step that was done; numbers that JSON does not know become text."""
        row = {key: _plain(value) for key, value in values.items()}
        self._rows.append({"step": step, **row})

    def seal(self) -> Segment | None:
        """The rows since the last confirmed segment as the next one; None if there are none."""
        if not self._rows:
            return None
        lines = [{"previous": self._previous}, *self._rows]
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        first, last = self._rows[0]["step"], self._rows[-1]["step"]
        return Segment(f"{first:06d}-{last:06d}-{digest_bytes(data)[7:19]}.jsonl", data, len(self._rows))

    def write(self, segment: Segment) -> None:
        """Writes a segment; needs nothing that the step loop changes.

        Raises:
            OSError: the disk is full, ...
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / segment.file, segment.data)

    def input(self, segment: Segment) -> Input:
        """How a checkpoint's manifest names it."""
        return Input(role=ROLE, kind="file", path=str(self.directory / segment.file), digest=segment.digest)

    def confirm(self, segment: Segment) -> None:
        """A checkpoint now names the segment: later rows go into another."""
        del self._rows[: segment.rows]
        self._previous = {"file": segment.file, "digest": segment.digest}

    def state(self, segment: Segment | None) -> dict[str, str] | None:
        """What a checkpoint keeps to go on after `segment`."""
        return self._previous if segment is None else {"file": segment.file, "digest": segment.digest}

    def restore(self, state: Mapping[str, str] | None, checkpoint: Path) -> None:
        """Goes on after a checkpoint; of another run's, the segments are copied, so that the chain stays whole.

        Raises:
            CheckpointError: a segment is missing or is not the one that was written.
        """
        self._rows.clear()
        self._previous = None if state is None else dict(state)
        source = _beside(checkpoint)
        if state is None or source.resolve() == self.directory.resolve():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for file, data in _back(source, state["file"], state["digest"]):
            if not (self.directory / file).exists():
                write_atomically(self.directory / file, data)


def read_ledger(checkpoint: str | Path) -> list[dict[str, Any]]:
    """The rows of every step that led to a checkpoint, oldest first; every digest is checked.

    Raises:
        CheckpointError: a segment is missing or is not the one that was written.
    """
    checkpoint = Path(checkpoint)
    named = next((item for item in read_manifest(checkpoint, "checkpoint").inputs if item.role == ROLE), None)
    if named is None:
        return []
    pieces = [data for _, data in _back(_beside(checkpoint), Path(named.path).name, named.digest)]
    return [json.loads(line) for data in reversed(pieces) for line in data.decode().splitlines()[1:]]


def _beside(checkpoint: Path) -> Path:
    """The ledger of a checkpoint's run, wherever the run was moved to."""
    return checkpoint.parent.parent / FOLDER


def _back(directory: Path, file: str, digest: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of a segment and of those before it, the last one first."""
    while True:
        path = directory / file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: a piece of the ledger cannot be read ({error.strerror})") from None
        if digest_bytes(data) != digest:
            raise CheckpointError(f"{path}: does not match its digest; the ledger is damaged or was edited")
        yield file, data
        previous = json.loads(data[: data.index(b"\n")])["previous"]
        if previous is None:
            return
        file, digest = previous["file"], previous["digest"]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
