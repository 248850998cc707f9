"""Models trained in processes beside each other, before they are asked for.

Small models leave most of a large machine idle: two runs of one thread do 1.7 times the work of one run of two here
(`docs/benchmarks.md`). Only training runs ahead: what computes in this process still does so one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from hcx.recipe.comparison import Cell
from hcx.recipe.comparison_cell import Workshop
from hcx.recipe.processes import Commands


class Ahead:
    """Trains the runs of cells, several at a time, in the order in which they were named.

    Args:
        workshop: trains them.
        jobs: runs at a time; with one, nothing runs ahead, and whoever asks for a model waits for its training.
        commands: what the workshop runs commands with, to be stopped when this is left early; None: nothing is.
    """

    def __init__(self, workshop: Workshop, jobs: int, commands: Commands | None = None) -> None:
        self._workshop, self._commands = workshop, commands
        self._pool = ThreadPoolExecutor(jobs, "ahead") if jobs > 1 else None
        self._runs: dict[str, Future[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._commands is not None:
            self._commands.stop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def start(self, cells: Iterable[Cell]) -> None:
        """Queues the runs of cells; cells that share one are trained once."""
        if self._pool is None:
            return
        for cell in cells:
            name = self._workshop.run_of(cell).name
            if self._workshop.trains(cell) and name not in self._runs:
                self._workshop.prepare(cell)
                self._runs[name] = self._pool.submit(self._workshop.train, cell)

    def wait(self, cell: Cell) -> None:
        """Returns once a cell's run is trained, if it was queued.

        Raises:
            TrainingError: training failed.
            KeyboardInterrupt: it was told to stop.
        """
        run = self._runs.get(self._workshop.run_of(cell).name)
        if run is not None:
            run.result()


def threads_of(jobs: int) -> int | None:
    """CPU threads of each of so many processes; None: one process has the machine."""
    return None if jobs == 1 else max(1, torch.get_num_threads() // jobs)
