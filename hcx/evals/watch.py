"""Evaluation while training goes on: one result for each saved checkpoint, by another process or job.

A checkpoint's manifest, written last, is the event that it was saved; a result's manifest, written last, is the record
that it was evaluated. Both are files, so nothing is lost or done twice when a consumer is killed in between: what has
no complete result is evaluated, what has one is not. Consumers on several machines may share a folder: a lock that the
system releases when its holder dies keeps them from the same checkpoint.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hcx.artifacts import is_complete
from hcx.errors import EvalError
from hcx.obs import get_logger

STEP = re.compile(r"^step-(\d+)$")

Evaluate = Callable[[Path, Path], None]
"""Evaluates a checkpoint into a result directory, which it writes atomically."""

log = get_logger(__name__)


def saved_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; those still being written are not among them.

    Args:
        run: the run's folder, or its folder of checkpoints.

    Raises:
        EvalError: no such folder.
    """
    if not run.is_dir():
        raise EvalError(f"{run}: no such folder; name the run that hcx train writes")
    found = [path for path in (*run.glob("step-*"), *run.glob("*/step-*")) if STEP.match(path.name)]
    return sorted((path for path in found if is_complete(path)), key=lambda path: int(path.name.split("-")[1]))


@contextmanager
def claimed(out: Path, name: str) -> Iterator[bool]:
    """Whether this process may evaluate a checkpoint: no living one does."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def evaluate_new(run: Path, out: Path, evaluate: Evaluate) -> list[str]:
    """Evaluates every checkpoint that has no complete result yet; names of those that this call evaluated."""
    done = []
    for checkpoint in saved_checkpoints(run):
        result = out / checkpoint.name
        if is_complete(result):
            continue
        with claimed(out, checkpoint.name) as mine:
            # Another consumer may have finished it between the look and the claim.
            if not mine or is_complete(result):
                continue
            if not is_complete(checkpoint):
                log.warning("%s was deleted before it was evaluated; keep more checkpoints", checkpoint)
                continue
            evaluate(checkpoint, result)
            done.append(checkpoint.name)
    return done


def watch(
    run: Path, out: Path, evaluate: Evaluate, poll_s: float = 30.0, finished: Callable[[], bool] = lambda: False
) -> None:
    """Goes on until the run is finished and every checkpoint is evaluated.

    Args:
        run: the run's folder.
        out: folder of results.
        evaluate: see `Evaluate`.
        poll_s: seconds between looks.
        finished: whether no checkpoint will come any more.
    """
    while True:
        last = finished()
        evaluate_new(run, out, evaluate)
        if last:
            return
        time.sleep(poll_s)
