"""Writing checkpoints: a snapshot in the step loop, the files on a thread, one rename at the end.

    snapshot   every rank copies its slices to CPU memory; ranks exchange what they will write   (main thread)
    write      every rank writes and synchronises its file                                       (thread)
    agree      ranks tell one another whether that went well                                     (main thread)
    commit     rank 0: ledger, index, manifest, rename, last-good pointer, retention             (thread)

The rename of the directory is the one moment at which a checkpoint comes to be, for all ranks or none: it happens only
after every rank has written its file. Collectives run on the main thread only, because another thread's would mix with
those of the steps. At most one checkpoint is in flight: who wants to save again waits for it.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from hcx.artifacts import Input
from hcx.artifacts.durable import nothing
from hcx.config import Config
from hcx.dist import process_environment
from hcx.engine.base import Engine
from hcx.errors import CheckpointError
from hcx.obs import get_logger
from hcx.train.background import Abandoned, Task
from hcx.train.checkpoint import checkpoints
from hcx.train.ledger import Ledger
from hcx.train.retention import remove_old_checkpoints
from hcx.train.writing import Files, Job, commit, prepare, snapshot, state_file, write_state

log = get_logger(__name__)

POLL_S = 0.05
"""How often a waiting main thread looks for progress."""
ABANDON_S = 10.0
"""How long an abandoned writer may take to see that it is."""


@dataclass(frozen=True)
class SaveOutcome:
    """How saving ended; equal on every rank.

    Attributes:
        step: that was saved.
        path: the checkpoint; None if there is none.
        problem: why there is none.
    """

    step: int
    path: Path | None
    problem: str | None = None


class CheckpointSaver:
    """Saves the checkpoints of one run; every rank has one.

    Args:
        directory: holds the run's checkpoints, on a file system that all ranks share.
        asynchronous: write on a thread; else `begin` returns when all is done. The files are the same bytes.
        keep: newest checkpoints that stay; 0: all.
        keep_every: checkpoints at multiples of this step stay for good; 0: none.
        ledger: of the run; on rank 0.
        beat: called while the main thread waits and the writing makes progress.
    """

    def __init__(
        self,
        directory: str | Path,
        asynchronous: bool = False,
        keep: int = 0,
        keep_every: int = 0,
        ledger: Ledger | None = None,
        beat: Callable[[], None] = nothing,
    ) -> None:
        self.directory = Path(directory)
        self._asynchronous, self._keep, self._keep_every = asynchronous, keep, keep_every
        self._ledger, self._beat = ledger, beat
        self._rank, self._world_size, _ = process_environment()
        self._job: Job | None = None
        self._task: Task | None = None
        self._committing = False
        self._abandoned = threading.Event()
        self._writes = 0

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint is being written; equal on every rank."""
        return self._job is not None

    @property
    def pending(self) -> bool:
        """Whether this rank's thread is still at work; `advance` is for when no rank's is."""
        return self._task is not None and not self._task.done

    def begin(
        self,
        step: int,
        engine: Engine,
        trainer_state: Mapping[str, Any],
        config: Config | Mapping[str, Any] | None = None,
        inputs: Iterable[Input] = (),
        counts: Mapping[str, Any] | None = None,
    ) -> SaveOutcome | None:
        """Takes a snapshot and starts writing; collective. None while the checkpoint is in flight.

        Args:
            step: optimizer steps done.
            engine: whose state is saved.
            trainer_state: JSON-serialisable.
            config, inputs, counts: for the manifest.
        """
        if self._job is not None:
            raise ValueError(f"the checkpoint of step {self._job.step} is still in flight")
        final = self.directory / f"step-{step:06d}"
        partial = self.directory / f".{final.name}.partial"
        tensors, entries = snapshot(engine, self._rank, copy=self._asynchronous)
        problem = prepare(self.directory, partial) if self._rank == 0 else None
        answers = self._gather((entries, problem))
        scalars = engine.scalars()
        problem = next((found for _, found in answers if found is not None), None)
        if problem is not None:
            return SaveOutcome(step, None, problem)
        segment = None if self._ledger is None else self._ledger.seal()
        state = {**trainer_state, "step": step, "engine": scalars}
        if self._ledger is not None:
            state["ledger"] = self._ledger.state(segment)
        job = self._job = Job(
            step=step,
            final=final,
            partial=partial,
            file=state_file(self._rank),
            tensors=tensors,
            entries=[entry for found, _ in answers for entry in found],
            trainer=(json.dumps(state, ensure_ascii=False, indent=1) + "\n").encode(),
            config=config if isinstance(config, Config) else dict(config or {}),
            inputs=tuple(inputs),
            counts={"step": step, **(counts or {})},
            segment=segment,
        )
        self._abandoned.clear()
        # A lone process has nobody to agree with: it writes and commits in one go.
        self._committing = self._world_size == 1
        if self._committing:
            self._start(lambda: self._commit(job, write_state(job, self._progress)))
        else:
            self._start(lambda: write_state(job, self._progress))
        return None if self._asynchronous else self.finish()

    def advance(self) -> SaveOutcome | None:
        """Takes the next step of a save whose threads are done on every rank; collective.

        Returns:
            The outcome, or None if rank 0 has now begun to commit.
        """
        if self._job is None or self._task is None:
            return None
        job = self._job
        answers = self._gather(self._task.result())
        told = {rank: problem for rank, (_, problem) in enumerate(answers) if problem is not None}
        if told:
            if self._rank == 0:
                shutil.rmtree(job.partial, ignore_errors=True)
            self._job = self._task = None
            named = self._world_size > 1
            return SaveOutcome(job.step, None, "; ".join(f"rank {r}: {p}" if named else p for r, p in told.items()))
        if not self._committing:
            self._committing = True
            files = {name: entry for written, _ in answers for name, entry in written.items()}
            self._start((lambda: self._commit(job, files)) if self._rank == 0 else nothing)
            return None
        if self._ledger is not None and job.segment is not None:
            self._ledger.confirm(job.segment)
        self._job = self._task = None
        return SaveOutcome(job.step, job.final)

    def finish(self) -> SaveOutcome | None:
        """Waits for the checkpoint in flight, if there is one; collective."""
        outcome = None
        while self._job is not None:
            self._wait()
            outcome = self.advance()
        return outcome

    def close(self, abandon: bool) -> None:
        """Ends without the other ranks: a lone process finishes what is in flight unless told to abandon it.

        A directory that is abandoned has no manifest; the next save removes it.
        """
        if self._task is None or self._job is None:
            return
        if abandon or self._world_size > 1:
            self._abandoned.set()
            self._task.join(ABANDON_S)
            log.warning("the checkpoint of step %d was abandoned", self._job.step)
        else:
            self._wait()
            _, problem = self._task.result()
            if problem is not None:
                log.warning("the checkpoint of step %d was not written: %s", self._job.step, problem)
        self._job = self._task = None

    def _start(self, work: Callable[[], Any]) -> None:
        self._task = Task(work, self._asynchronous)

    def _commit(self, job: Job, files: Files) -> None:
        commit(job, files, self._ledger, self._progress)
        remove_old_checkpoints(checkpoints(self.directory), job.step, self._keep, self._keep_every)

    def _wait(self) -> None:
        seen = -1
        while self.pending and self._task is not None:
            self._task.join(POLL_S)
            if self._writes != seen:
                seen = self._writes
                self._beat()

    def _progress(self) -> None:
        self._writes += 1
        if self._abandoned.is_set():
            raise Abandoned
        if not self._asynchronous:
            self._beat()

    def _gather(self, mine: Any) -> list[Any]:
        if self._world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone


def save_checkpoint(
    directory: str | Path,
    step: int,
    engine: Engine,
    trainer_state: Mapping[str, Any],
    config: Config | Mapping[str, Any] | None = None,
    inputs: Iterable[Input] = (),
    counts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `directory/step-NNNNNN` and returns when it is there; collective.

    Raises:
        CheckpointError: a rank could not write; nothing that can be selected is left behind.
    """
    outcome = CheckpointSaver(directory).begin(step, engine, trainer_state, config, inputs, counts)
    if outcome is None or outcome.path is None:
        problem = None if outcome is None else outcome.problem
        raise CheckpointError(f"{directory}: the checkpoint of step {step} was not written: {problem}")
    return outcome.path
