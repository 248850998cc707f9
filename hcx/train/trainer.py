"""The training loop. It owns schedule, token count, callbacks, loader position, checkpoints and events.

It never asks which engine it has: a step is `engine.train_step` on this replica's slice of the global batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

from hcx.artifacts import Input
from hcx.config import Config
from hcx.data.batch import MicroBatch
from hcx.engine.base import Engine, Objective, StepBatch, StepStats
from hcx.errors import CheckpointError
from hcx.model.transforms import ModelTransform
from hcx.obs import Progress, Sink, get_logger
from hcx.optim import Schedule, lr_factor
from hcx.train.checkpoint import CheckpointReader, remove_old_checkpoints, save_checkpoint
from hcx.train.signals import StopRequest
from hcx.train.validation import ValidationSet, bits_per_byte

log = get_logger(__name__)


class TrainerConfig(Config):
    """Length of a run, batch, validation and checkpoints."""

    steps: int
    """Optimizer steps of the whole run."""
    global_batch: int
    """Rows (samples of `seq_len` tokens) per optimizer step, over all replicas; with `data.kind: chat`, tokens."""
    micro_batch: int
    """Rows per forward; with `data.kind: chat`, tokens at most, filling included."""
    validate_every: int = 100
    """Steps between validations; 0: at the end only."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    max_minutes: float | None = None
    """Save and stop as resumable after this time."""
    max_skipped_steps: int = 20
    """Consecutive steps with a non-finite gradient after which the run stops."""


class Loader(Protocol):
    """What the trainer needs of a data loader: the samples of a step as a pure function of its number."""

    def batches(
        self,
        start_step: int,
        stop_step: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        threads: int,
    ) -> Generator[list[MicroBatch]]:
        """The micro-batches of one replica in steps `start_step` to `stop_step - 1`, prepared ahead by threads."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What decides the order of the data, and where it stands (`next_sample`: how many samples have been taken)."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken; an error if the order would be another."""
        ...


class Callback:
    """Observes a run; every hook has a neutral default and runs on every rank."""

    def after_step(self, step: int, stats: StepStats, metrics: dict[str, float]) -> None:
        """After optimizer step `step` (counted from 1); may add metrics."""

    def after_validation(self, step: int, values: Mapping[str, float]) -> None:
        """After a validation."""


@dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done.
        finished: whether that is all of them; else it is resumable.
        bits_per_byte: the last validation; of conversations, the loss per trained token.
        tokens: trained tokens (targets with weight).
        seconds: time in the loop, in this process.
    """

    step: int
    finished: bool
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """Runs the loop.

    Args:
        config: lengths and intervals.
        engine: runs the steps.
        loader: makes the batches.
        objective: the loss.
        schedule: of the learning rate.
        directory: receives `checkpoints/`.
        validation: held-out text per language.
        transforms: methods that hook into training.
        sinks: where metrics go; given on rank 0 only.
        callbacks: observers.
        resolved: the run's configuration, for the manifests.
        inputs: what the run was made from, for the manifests.
        flops_per_token: of forward and backward, for `throughput/mfu`.
        peak_flops: of one device; 0: unknown, no `throughput/mfu`.
        stop: asked before each step; a reason ends the run as resumable.
        prefetch: threads that prepare batches ahead; 0: none. The order does not depend on it.
    """

    def __init__(
        self,
        config: TrainerConfig,
        engine: Engine,
        loader: Loader,
        objective: Objective,
        schedule: Schedule,
        directory: str | Path,
        validation: Sequence[ValidationSet] = (),
        transforms: Sequence[ModelTransform] = (),
        sinks: Sequence[Sink] = (),
        callbacks: Sequence[Callback] = (),
        resolved: Config | None = None,
        inputs: Iterable[Input] = (),
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        stop: Callable[[], str | None] | None = None,
        prefetch: int = 0,
    ) -> None:
        self.config, self.engine, self.loader, self.objective = config, engine, loader, objective
        self.schedule, self.directory = schedule, Path(directory)
        self.validation, self.transforms, self.sinks = tuple(validation), tuple(transforms), tuple(sinks)
        self.callbacks, self.resolved, self.inputs = tuple(callbacks), resolved, tuple(inputs)
        self._flops_per_token, self._peak_flops, self._stop = flops_per_token, peak_flops, stop
        self._prefetch = prefetch
        self.step = 0
        self.tokens = 0
        self.sources: Counter[str] = Counter()
        self._skipped_in_a_row = 0
        self._saved_step = -1

    def resume(self, reader: CheckpointReader) -> None:
        """Continues after a checkpoint: masters, optimizer state, position in the data, transforms."""
        state = reader.trainer_state
        if state.get("global_batch") != self.config.global_batch:
            raise CheckpointError(
                f"{reader.directory}: written with train.global_batch = {state.get('global_batch')}, now "
                f"{self.config.global_batch}; the position in the data would shift: keep the global batch"
            )
        self.loader.load_state_dict(state.get("loader", {}))
        self.engine.load_slices(reader)
        self.engine.load_scalars(state.get("engine", {}))
        for transform, saved in zip(self.transforms, state.get("transforms", []), strict=False):
            transform.load_state_dict(saved)
        self.step, self.tokens = int(state["step"]), int(state.get("tokens", 0))
        self.sources = Counter(state.get("sources", {}))
        self._saved_step = self.step
        log.info("resumed from %s at step %d", reader.directory, self.step)

    def run(self) -> TrainResult:
        """Trains to the last step, a signal or the deadline."""
        config = self.config
        start = time.monotonic()
        last: dict[str, float] = {}
        seconds = None if config.max_minutes is None else 60 * config.max_minutes
        place = self.engine.topology
        steps = self.loader.batches(
            self.step,
            config.steps,
            config.global_batch,
            config.micro_batch,
            place.dp_rank,
            place.dp_size,
            threads=self._prefetch,
        )
        progress = Progress("training", config.steps, "steps", done=self.step)
        with StopRequest(seconds) as request, progress, closing(steps):
            if self.validation and self.step == 0 and config.validate_every:
                last = self._validate()
            while self.step < config.steps:
                reason = self._agree(request.reason or (self._stop() if self._stop else None))
                if reason is not None:
                    log.warning("stopping at step %d because of %s; run again to resume", self.step, reason)
                    self._save()
                    return TrainResult(self.step, False, last, self.tokens, time.monotonic() - start)
                self._train_step(steps)
                progress.advance()
                ended = self.step == config.steps
                if self.validation and (ended or (config.validate_every and self.step % config.validate_every == 0)):
                    last = self._validate()
                if not ended and config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._save()
            for transform in self.transforms:
                transform.finalize(self.engine)
        if self._saved_step != self.step:
            self._save()
        return TrainResult(self.step, True, last, self.tokens, time.monotonic() - start)

    def _train_step(self, steps: Generator[list[MicroBatch]]) -> None:
        config, index = self.config, self.step
        begun = time.monotonic()
        batches = [batch.to(self.engine.device) for batch in next(steps)]
        for transform in self.transforms:
            transform.before_step(index)
        factor = lr_factor(self.schedule, index, config.steps)
        stats = self.engine.train_step(StepBatch(index, batches), self.objective, factor)
        extra: dict[str, float] = {}
        for transform in self.transforms:
            extra.update(transform.after_step(index, self.engine))
        self.step += 1
        self.tokens += round(stats.weight)
        self._watch(stats)
        self.sources.update(self._count_sources(batches))
        if self.sinks or self.callbacks:
            metrics = self._metrics(stats, factor, time.monotonic() - begun) | extra
            for callback in self.callbacks:
                callback.after_step(self.step, stats, metrics)
            self._write(metrics)

    def _count_sources(self, batches: Sequence[MicroBatch]) -> dict[str, int]:
        """Rows of each source in the global batch."""
        mine, place = Counter(source for batch in batches for source in batch.sources), self.engine.topology
        if place.dp_size == 1:
            return dict(mine)
        everyone: list[Counter[str]] = [Counter()] * place.world_size
        # One rank answers for each replica.
        torch.distributed.all_gather_object(everyone, mine if place.tp_rank == place.pp_rank == 0 else Counter())
        return dict(sum(everyone, Counter()))

    def _metrics(self, stats: StepStats, factor: float, seconds: float) -> dict[str, float]:
        rate = stats.weight / seconds
        metrics = {
            "train/loss": stats.loss,
            "train/lr": self.resolved_lr * factor,
            "train/grad_norm": stats.grad_norm,
            "train/tokens": float(self.tokens),
            "throughput/tokens_per_s": rate,
            "throughput/step_s": seconds,
        }
        if self._peak_flops and self._flops_per_token:
            metrics["throughput/mfu"] = (
                rate * self._flops_per_token / (self._peak_flops * self.engine.topology.world_size)
            )
        if stats.skipped:
            metrics["train/skipped"] = 1.0
        total = sum(self.sources.values())
        metrics |= {f"data/share/{name}": count / total for name, count in sorted(self.sources.items())}
        metrics |= {f"train/{name}": value / stats.weight for name, value in stats.metrics.items() if stats.weight}
        return metrics

    @property
    def resolved_lr(self) -> float:
        """The peak learning rate, for the log."""
        optim = getattr(self.resolved, "optim", None)
        return float(optim.lr) if optim is not None else 1.0

    def _watch(self, stats: StepStats) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if stats.skipped else 0
        if stats.skipped:
            log.warning("step %d was skipped: gradient norm %s", self.step, stats.grad_norm)
        if self._skipped_in_a_row >= self.config.max_skipped_steps:
            raise CheckpointError(
                f"{self._skipped_in_a_row} steps in a row had no finite gradient; the last good checkpoint is in "
                f"{self.directory / 'checkpoints'}; lower optim.lr, or lengthen optim.schedule.warmup_steps"
            )

    def _validate(self) -> dict[str, float]:
        values = bits_per_byte(self.engine, self.validation)
        self._write({f"validation/{held.metric}/{held.language}": values[held.language] for held in self.validation})
        for callback in self.callbacks:
            callback.after_validation(self.step, values)
        return values

    def _write(self, metrics: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(self.step, metrics)

    def _agree(self, reason: str | None) -> str | None:
        """A stop that any rank asks for is everyone's."""
        if self.engine.topology.world_size == 1:
            return reason
        flag = torch.tensor(int(reason is not None), device=self.engine.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return (reason or "another rank") if int(flag) else None

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        loader = self.loader.state_dict()
        # Sample numbers are consecutive in the loader's order, whatever number of them a step takes.
        samples = int(loader.get("next_sample", self.step * self.config.global_batch))
        state: dict[str, Any] = {
            "tokens": self.tokens,
            "global_batch": self.config.global_batch,
            "samples": [0, samples],
            "sources": dict(self.sources),
            "loader": loader,
            "transforms": [transform.state_dict() for transform in self.transforms],
        }
        counts = {"tokens": self.tokens, "samples": samples}
        path = save_checkpoint(
            self.directory / "checkpoints", self.step, self.engine, state, self.resolved, self.inputs, counts
        )
        self._saved_step = self.step
        if self.engine.topology.rank == 0:
            log.info("checkpoint %s", path)
            if self.config.keep_checkpoints:
                remove_old_checkpoints(path.parent, self.config.keep_checkpoints)
