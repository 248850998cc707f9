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

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from hcx.artifacts import Input, write_safetensors
from hcx.artifacts.durable import nothing, replace_directory, write_durably
from hcx.artifacts.manifest import write_manifest
from hcx.config import Config
from hcx.dist import process_environment
from hcx.engine.base import Engine
from hcx.errors import CheckpointError
from hcx.obs import get_logger
from hcx.train.checkpoint import INDEX, TRAINER, checkpoints
from hcx.train.ledger import Ledger, Segment
from hcx.train.retention import LAST_GOOD, mark_last_good, remove_old_checkpoints

log = get_logger(__name__)

POLL_S = 0.05
"""How often a waiting main thread looks for progress."""
ABANDON_S = 10.0
"""How long an abandoned writer may take to see that it is."""


class _Abandoned(Exception):
    """The writer was told to stop."""


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


@dataclass(frozen=True)
class _Job:
    """All that writing needs; nothing of it changes while steps go on.

    Attributes:
        final, partial: where the directory will be, and where it is written.
        file: this rank's file.
        tensors: entry -> values, of this rank.
        entries: of every rank, for the index; on rank 0.
        trainer: the content of `trainer.json`; on rank 0.
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


class _Task:
    """Work on a thread of its own, or done at once."""

    def __init__(self, work: Callable[[], Any], threaded: bool) -> None:
        self._work = work
        self._answer: Any = None
        self._problem: str | None = None
        self._bug: BaseException | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="hcx-checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._answer = self._work()
        except OSError as error:
            self._problem = f"{error.filename or 'writing'}: {error.strerror or error}"
        except _Abandoned:
            self._problem = "abandoned"
        except BaseException as error:
            if self._thread is None:
                raise
            self._bug = error

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def result(self) -> tuple[Any, str | None]:
        """(answer, problem of the user's); raises what is a mistake of ours."""
        if self._bug is not None:
            raise self._bug
        return self._answer, self._problem


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
        self._job: _Job | None = None
        self._task: _Task | None = None
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
        tensors, entries = self._snapshot(engine)
        problem = self._prepare(partial) if self._rank == 0 else None
        answers = self._gather((entries, problem))
        scalars = engine.scalars()
        problem = next((found for _, found in answers if found is not None), None)
        if problem is not None:
            return SaveOutcome(step, None, problem)
        segment = None if self._ledger is None else self._ledger.seal()
        state = {**trainer_state, "step": step, "engine": scalars}
        if self._ledger is not None:
            state["ledger"] = self._ledger.state(segment)
        self._job = _Job(
            step=step,
            final=final,
            partial=partial,
            file=_state_file(self._rank),
            tensors=tensors,
            entries=[entry for found, _ in answers for entry in found],
            trainer=(json.dumps(state, ensure_ascii=False, indent=1) + "\n").encode(),
            config=config if isinstance(config, Config) else dict(config or {}),
            inputs=tuple(inputs),
            counts={"step": step, **(counts or {})},
            segment=segment,
        )
        self._abandoned.clear()
        self._committing = self._world_size == 1
        self._start(self._write_and_commit if self._committing else self._write)
        return None if self._asynchronous else self.finish()

    def advance(self) -> SaveOutcome | None:
        """Takes the next step of a save whose threads are done on every rank; collective.

        Returns:
            The outcome, or None if rank 0 has now begun to commit.
        """
        if self._job is None or self._task is None:
            return None
        job = self._job
        answer, problem = self._task.result()
        answers = self._gather((answer, problem))
        problems = [
            f"rank {rank}: {found}" if self._world_size > 1 else found
            for rank, (_, found) in enumerate(answers)
            if found
        ]
        if problems:
            if self._rank == 0:
                shutil.rmtree(job.partial, ignore_errors=True)
            self._job = self._task = None
            return SaveOutcome(job.step, None, "; ".join(problems))
        if not self._committing:
            self._committing = True
            files = {name: entry for written, _ in answers for name, entry in written.items()}
            self._start((lambda: self._commit(files)) if self._rank == 0 else nothing)
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
        self._task = _Task(work, self._asynchronous)

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
            raise _Abandoned
        if not self._asynchronous:
            self._beat()

    def _gather(self, mine: Any) -> list[Any]:
        if self._world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def _prepare(self, partial: Path) -> str | None:
        """An empty directory to write into, and nothing left of saves that were cut short."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in [*self.directory.glob(".step-*.partial"), *self.directory.glob(".step-*.old")]:
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return None

    def _snapshot(self, engine: Engine) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """This rank's slices in CPU memory, and what the index says of them."""
        tensors: dict[str, Tensor] = {}
        entries = []
        for piece in engine.state_slices():
            entry = f"{piece.name}|{piece.key}|{len(tensors)}"
            # While a thread writes, steps go on: it needs values of its own.
            values = piece.tensor.detach().to(device="cpu", dtype=torch.float32, copy=self._asynchronous)
            tensors[entry] = values.contiguous()
            entries.append(
                {
                    "name": piece.name,
                    "key": piece.key,
                    "global_shape": list(piece.global_shape),
                    "file": _state_file(self._rank),
                    "entry": entry,
                    "offset": list(piece.offset),
                    "shape": list(piece.shape),
                    "flat_range": None if piece.flat_range is None else list(piece.flat_range),
                }
            )
        return tensors, entries

    def _write_and_commit(self) -> None:
        self._commit(self._write())

    def _write(self) -> dict[str, dict[str, Any]]:
        """This rank's file, on the disk; name -> size and digest."""
        job = self._current()
        if not job.tensors:
            return {}
        return {job.file: write_safetensors(job.partial / job.file, job.tensors, self._progress)}

    def _commit(self, files: Mapping[str, dict[str, Any]]) -> None:
        """Rank 0: everything that is written once, the manifest last, then the rename."""
        job = self._current()
        inputs = list(job.inputs)
        if self._ledger is not None and job.segment is not None:
            self._ledger.write(job.segment)
            inputs.append(self._ledger.input(job.segment))
        index: dict[str, dict[str, dict[str, Any]]] = {}
        for entry in job.entries:
            piece = dict(entry)
            name, key, shape = piece.pop("name"), piece.pop("key"), piece.pop("global_shape")
            index.setdefault(name, {}).setdefault(key, {"shape": shape, "slices": []})["slices"].append(piece)
        text = json.dumps(index, indent=1).encode()
        every = {
            **files,
            INDEX: write_durably(job.partial / INDEX, [text], self._progress),
            TRAINER: write_durably(job.partial / TRAINER, [job.trainer], self._progress),
        }
        write_manifest(
            job.partial, "checkpoint", job.config, inputs, job.counts, dict(sorted(every.items())), sealed=True
        )
        replace_directory(job.partial, job.final)
        try:
            mark_last_good(job.final, job.step)
        except OSError as error:
            # Without a pointer the newest checkpoint is taken, which is this one.
            with contextlib.suppress(OSError):
                (self.directory / LAST_GOOD).unlink(missing_ok=True)
            log.warning("%s is written, but the pointer to it is not: %s", job.final, error.strerror)
        remove_old_checkpoints(checkpoints(self.directory), job.step, self._keep, self._keep_every)

    def _current(self) -> _Job:
        if self._job is None:
            raise ValueError("no checkpoint is in flight")
        return self._job


def _state_file(rank: int) -> str:
    return f"state-{rank:05d}.safetensors"


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
        raise CheckpointError(
            f"{directory}: the checkpoint of step {step} was not written: {outcome and outcome.problem}"
        )
    return outcome.path
