"""A run may take many starts. Each is an event in the run's log, with what became of the one before it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hcx.errors import HcxError, PeerLost
from hcx.obs import Sink, read_jsonl

START, STOPPED, LOST, FAILED, FINISHED = "start", "stopped", "peer_lost", "failed", "finished"
ENDINGS = (STOPPED, LOST, FAILED, FINISHED)
_SLURM = {"job": "SLURM_JOB_ID", "restart": "SLURM_RESTART_COUNT", "nodes": "SLURM_JOB_NODELIST"}


def start_details(directory: Path, world_size: int) -> dict[str, Any]:
    """What the event of a start says: which it is, where it runs, and how the one before it ended."""
    path = directory / "metrics.jsonl"
    rows = list(read_jsonl(path)) if path.exists() else []
    starts = sum(row.get("event") == START for row in rows)
    details: dict[str, Any] = {"attempt": starts + 1, "ranks": world_size, "host": socket.gethostname()}
    details |= {name: os.environ[variable] for name, variable in _SLURM.items() if variable in os.environ}
    if starts:
        details["previous"] = _previous(rows)
    return details


def _previous(rows: Iterable[Mapping[str, Any]]) -> str:
    ended, step = "", 0
    for row in rows:
        step = max(step, int(row.get("step", 0)))
        name = row.get("event")
        if name == START:
            ended = ""
        elif name in ENDINGS:
            ended = f"{name}: {row.get('reason', '')}".removesuffix(": ")
    return ended or f"ended without a word after step {step}: killed, or its node was lost"


@contextmanager
def endings_in_the_log(sinks: Sequence[Sink], step: Callable[[], int]) -> Iterator[None]:
    """An error becomes an event; `step()` is where the run was."""
    try:
        yield
    except Exception as error:
        name = LOST if isinstance(error, PeerLost) else FAILED
        text = str(error) if isinstance(error, HcxError) else f"{type(error).__name__}: {error}"
        for sink in sinks:
            sink.event(step(), name, {"reason": (text.strip() or name).splitlines()[0]})
        raise
