"""`hcx train` on several ranks of which one goes wrong in a chosen way, each rank a process of its own.

Ranks are forked from a server that has imported everything, so a test of them takes little more than the run itself.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcx.dist.spawn import free_port
from hcx.errors import DataError
from hcx.testing.workers import quiet_main

WAIT_S = 120.0
FAULTY_RANK = 1


def sleeps_for_ever() -> None:
    """A name to look for in a stack."""
    time.sleep(3600)


def _mistake() -> None:
    raise ZeroDivisionError("a mistake of ours")


def _bad_data() -> None:
    raise DataError("shard 7 is damaged; copy it again")


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Callable[[], None]] = {
    "sleeps": sleeps_for_ever,
    "mistake": _mistake,
    "bad data": _bad_data,
    "killed": _killed,
    "nan": lambda: None,
    "other software": lambda: None,
}


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended.

    Attributes:
        code: exit code, negative for a signal.
        log: what it wrote to standard error and output.
    """

    code: int
    log: str


def train_on_ranks(recipe: str | Path, fault: str, sample: int, directory: Path, world_size: int = 2) -> list[RankEnd]:
    """Runs `hcx train RECIPE` on each rank; rank 1 meets the fault (of `FAULTS`) when it has this sample.

    The fault `nan` makes the loss of its micro-batch NaN on that rank alone; with `other software` the rank says from
    the start that its torch is another one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hcx.testing.ranks", "hcx.recipe.run"])
    port = free_port()
    logs = [directory / f"rank-{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        arguments = (str(recipe), fault, sample, rank, world_size, port, str(log))
        process = context.Process(target=_rank, args=arguments)
        with quiet_main():
            process.start()
        processes.append(process)
    deadline = time.monotonic() + WAIT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [
        RankEnd(process.exitcode or 0, log.read_text(encoding="utf-8", errors="replace"))
        for process, log in zip(processes, logs, strict=True)
    ]


def _rank(recipe: str, fault: str, sample: int, rank: int, world_size: int, port: int, log: str) -> None:
    import torch

    from hcx.cli.main import main

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.__stderr__ = sys.stderr  # type: ignore[misc]
    torch.set_num_threads(1)
    if rank == FAULTY_RANK:
        _arm(fault, sample)
    main(["train", recipe])


def _arm(fault: str, sample: int) -> None:
    from hcx.dist import rendezvous
    from hcx.train.objectives import NextToken

    if fault == "other software":
        found = rendezvous.versions()
        rendezvous.versions = lambda: {**found, "torch": "1.0.0"}
    honest = NextToken.__call__

    def faulty(self: NextToken, output: Any, micro_batch: Any) -> Any:
        total, metrics = honest(self, output, micro_batch)
        if sample in micro_batch.sample_ids:
            FAULTS[fault]()
            if fault == "nan":
                total = total * math.nan
        return total, metrics

    NextToken.__call__ = faulty  # type: ignore[method-assign]
