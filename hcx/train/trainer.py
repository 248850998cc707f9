"""The training loop. It owns schedule, token count, callbacks, loader position, checkpoints, events and the ledger.

It never asks which engine it has: a step is `engine.train_step` on this replica's slice of the global batch.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hcx.artifacts import Input
from hcx.config import Config
from hcx.data.batch import MicroBatch
from hcx.engine.base import Engine, Objective, StepBatch, StepStats
from hcx.errors import CheckpointError, TrainingError
from hcx.model.transforms import ModelTransform
from hcx.obs import Progress, Sink, get_logger
from hcx.optim import Schedule, lr_factor
from hcx.train.callbacks import Callback
from hcx.train.checkpoint import CheckpointReader, find_checkpoint
from hcx.train.config import TrainerConfig
from hcx.train.exchange import GlobalStep, any_rank, exchange, first_reason
from hcx.train.keeper import CheckpointKeeper
from hcx.train.ledger import Ledger, as_ranges
from hcx.train.loader import Loader
from hcx.train.resilience import Action, StepWatch, Verdict
from hcx.train.saving import CheckpointSaver, SaveOutcome
from hcx.train.signals import StopRequest
from hcx.train.stages import Stage, stage_at
from hcx.train.validation import ValidationSet, bits_per_byte
from hcx.train.watchdog import Watchdog

log = get_logger(__name__)

CHECKPOINTS = "checkpoints"
STALLS = "stalls"


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
        directory: receives `checkpoints/`, `ledger/` and, if a rank hangs, `stalls/`.
        validation: held-out text per language.
        transforms: methods that hook into training.
        sinks: where metrics go; given on rank 0 only.
        callbacks: observers.
        resolved: the run's configuration, for the manifests.
        inputs: what the run was made from, for the manifests.
        flops_per_token: sequence length -> FLOPs of forward and backward, for `throughput/mfu`.
        peak_flops: of one device; 0: unknown, no `throughput/mfu`.
        stop: asked before each step; a reason ends the run as resumable.
        prefetch: threads that prepare batches ahead; 0: none. The order does not depend on it.
        stages: the plan that `loader` follows, where the sequence length changes on the way.
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
        flops_per_token: Callable[[int], float] | None = None,
        peak_flops: float = 0.0,
        stop: Callable[[], str | None] | None = None,
        prefetch: int = 0,
        stages: Sequence[Stage] = (),
    ) -> None:
        self.config, self.engine, self.loader, self.objective = config, engine, loader, objective
        self.schedule, self.directory = schedule, Path(directory)
        self.validation, self.transforms, self.sinks = tuple(validation), tuple(transforms), tuple(sinks)
        self.callbacks, self.resolved, self.inputs = tuple(callbacks), resolved, tuple(inputs)
        self._flops_per_token, self._peak_flops, self._stop = flops_per_token, peak_flops, stop
        self._prefetch, self._stages = prefetch, tuple(stages)
        self._stage = stage_at(self._stages, 0) if self._stages else None
        self.step = 0
        self.tokens = 0
        self.rows = 0
        self.sources: Counter[str] = Counter()
        rank = engine.topology.rank
        self._watch = StepWatch(config.resilience, config.max_skipped_steps)
        self._watchdog = Watchdog(config.watchdog_s, rank, self.directory / STALLS)
        self._ledger = Ledger(self.directory) if rank == 0 else None
        self._saver = CheckpointSaver(
            self.directory / CHECKPOINTS,
            config.checkpoint_async,
            config.keep_checkpoints,
            config.keep_every,
            self._ledger,
            self._watchdog.beat,
        )
        self._keeper = CheckpointKeeper(config, self._saver, self._event)

    def resume(self, reader: CheckpointReader) -> None:
        """Continues after a checkpoint: masters, optimizer state, position in the data, transforms, judgement."""
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
        self.rows = int(state.get("rows", self.step * self.config.global_batch))
        self.sources = Counter(state.get("sources", {}))
        self._watch.load_state_dict(state.get("watch", {}))
        if self._ledger is not None:
            self._ledger.restore(state.get("ledger"), reader.directory)
        if self._stages:
            # A switch that lies right here is still to come: it belongs to the next step.
            self._stage = stage_at(self._stages, max(0, self.step - 1))
        self._keeper.resumed(self.step)
        log.info("resumed from %s at step %d", reader.directory, self.step)

    def run(self) -> TrainResult:
        """Trains to the last step, a signal or the deadline.

        Raises:
            TrainingError: bad steps, and the policy says to end the run; the state before them is saved.
            CheckpointError: a checkpoint that must be written cannot be.
        """
        config = self.config
        seconds = None if config.max_minutes is None else 60 * config.max_minutes
        progress = Progress("training", config.steps, "steps", done=self.step)
        with self._watchdog, StopRequest(seconds) as request, progress:
            try:
                return self._run(request, progress)
            except BaseException as error:
                self._saver.close(abandon=isinstance(error, KeyboardInterrupt))
                raise

    def _run(self, request: StopRequest, progress: Progress) -> TrainResult:
        config = self.config
        start = time.monotonic()
        last: dict[str, float] = {}
        if self._stage is not None:
            self.engine.set_rope_theta(self._stage.rope_theta)
        if self.validation and self.step == 0 and config.validate_every:
            last = self._validate()
        if config.resilience.rewinds and self._keeper.saved < 0 and self.step < config.steps:
            self._save()  # something to go back to
        while self.step < config.steps:
            rewound = False
            with closing(self._batches()) as steps:
                while self.step < config.steps and not rewound:
                    reason = self._agree(request.reason or (self._stop() if self._stop else None))
                    if reason is not None:
                        log.warning("stopping at step %d because of %s; run again to resume", self.step, reason)
                        self._event(self.step, "stopped", {"reason": reason})
                        self._save(for_good=True)
                        return TrainResult(self.step, False, last, self.tokens, time.monotonic() - start)
                    rewound = self._train_step(steps)
                    progress.done = self.step - 1
                    progress.advance()
                    if rewound:
                        continue
                    ended = self.step == config.steps
                    if self.validation and (
                        ended or (config.validate_every and self.step % config.validate_every == 0)
                    ):
                        last = self._validate()
                    if not ended and config.checkpoint_every and self.step % config.checkpoint_every == 0:
                        self._save()
        for transform in self.transforms:
            transform.finalize(self.engine)
        self._save(for_good=True)
        return TrainResult(self.step, True, last, self.tokens, time.monotonic() - start)

    def _batches(self) -> Generator[list[MicroBatch]]:
        config, place = self.config, self.engine.topology
        return self.loader.batches(
            self.step,
            config.steps,
            config.global_batch,
            config.micro_batch,
            place.dp_rank,
            place.dp_size,
            threads=self._prefetch,
        )

    def _train_step(self, steps: Generator[list[MicroBatch]]) -> bool:
        """One step; True if the run went back instead."""
        config, index = self.config, self.step
        begun = time.monotonic()
        before = self.loader.state_dict()
        self._watchdog.beat(f"reading the data of step {index + 1}")
        batches = [batch.to(self.engine.device) for batch in next(steps)]
        self._switch_stage(index)
        if index in self._watch.left_out:
            self._leave_out(batches)
            return False
        self._watchdog.beat(f"in step {index + 1}")
        for transform in self.transforms:
            transform.before_step(index)
            transform.probe(index, partial(self._gradients, index, batches[0]))
        factor = lr_factor(self.schedule, index, config.steps)
        limits, refused = self._watch.limits(), self._watch.engine_limits()
        stats = self.engine.train_step(StepBatch(index, batches, *refused), self.objective, factor)
        verdict = self._watch.judge(stats, limits)
        whole = exchange(self.engine.topology, batches, verdict.action)
        if verdict.action < whole.action:
            verdict = Verdict(whole.action, "another rank's judgement")
        if verdict.action is not Action.ACCEPT:
            self._report(verdict, stats, whole)
        if verdict.action is Action.ABORT:
            self._abort(verdict, before)
        if verdict.action is Action.REWIND:
            self._rewind(verdict)
            return True
        extra: dict[str, float] = {}
        for transform in self.transforms:
            extra.update(transform.after_step(index, self.engine))
        self._advance(whole, stats, verdict.reason if stats.skipped else None)
        if self.sinks or self.callbacks:
            length = batches[0].tokens.shape[1]
            metrics = self._metrics(stats, factor, time.monotonic() - begun, length) | extra
            for callback in self.callbacks:
                callback.after_step(self.step, stats, metrics)
            self._write(metrics)
        return False

    def _gradients(self, index: int, batch: MicroBatch, visit: Callable[[str, Tensor], None], rows: int = 1) -> float:
        """`GradientSource` of step `index`, on a part of its first micro-batch."""
        self._watchdog.beat(f"probing gradients before step {index + 1}")
        return self.engine.gradients(StepBatch(index, [batch.heaviest(rows)]), self.objective, visit)

    def _switch_stage(self, index: int) -> None:
        """Another stage may begin with this step: the rotary base changes, and what losses were usual is open again."""
        if self._stage is None or stage_at(self._stages, index) == self._stage:
            return
        self._stage = stage_at(self._stages, index)
        self.engine.set_rope_theta(self._stage.rope_theta)
        self._watch.forget()
        values = {
            "seq_len": self._stage.seq_len,
            "global_batch": self._stage.global_batch,
            "rope_theta": self._stage.rope_theta,
        }
        self._event(index + 1, "stage", values)

    def _advance(self, whole: GlobalStep, stats: StepStats, refused: str | None) -> None:
        """Books a step that is done."""
        self.step += 1
        self.tokens += 0 if stats.skipped else round(stats.weight)
        self.rows += whole.rows
        self.sources.update(whole.sources)
        if self._ledger is not None:
            row: dict[str, Any] = {"loss": stats.loss, "grad_norm": stats.grad_norm, "weight": stats.weight}
            row["samples"] = as_ranges(whole.samples)
            if refused is not None:
                row["no_update"] = refused
            self._ledger.add(self.step, row)

    def _leave_out(self, batches: Sequence[MicroBatch]) -> None:
        """A step on the list: its samples pass by, and nothing is computed."""
        whole = exchange(self.engine.topology, batches, Action.ACCEPT)
        self._advance(whole, StepStats(0.0, 0.0, grad_norm=math.nan, skipped=True), "left out")
        self._write({"train/skipped": 1.0, "train/tokens": float(self.tokens)})

    def _report(self, verdict: Verdict, stats: StepStats, whole: GlobalStep) -> None:
        action = verdict.action.name.lower()
        log.warning("step %d: %s; policy: %s", self.step + 1, verdict.reason, action)
        details = {
            "action": action,
            "reason": verdict.reason,
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "samples": as_ranges(whole.samples),
        }
        self._event(self.step + 1, "bad_step", details)

    def _abort(self, verdict: Verdict, before: Mapping[str, Any]) -> None:
        """Saves the state before the bad step, which made no update, and ends the run."""
        self.loader.load_state_dict(before)
        self._save(for_good=True)
        raise TrainingError(
            f"step {self.step + 1}: {verdict.reason}. The state before it is the checkpoint of step {self.step} in "
            f"{self.directory / CHECKPOINTS}, the samples are in {self.directory / 'metrics.jsonl'}; lower optim.lr, "
            "lengthen optim.schedule.warmup_steps, or choose another policy (train.resilience)"
        )

    def _rewind(self, verdict: Verdict) -> None:
        """Back to the last good checkpoint; the bad step is left out when the run comes by again."""
        bad = self.step
        self._keeper.settle()
        self._watchdog.beat(f"going back from step {bad + 1}")
        reader = find_checkpoint(self.directory / CHECKPOINTS, up_to=bad)
        if reader is None:
            raise TrainingError(f"step {bad + 1}: {verdict.reason}; there is no checkpoint to go back to")
        left_out = self._watch.leave_out(bad)
        self.resume(reader)
        if self._stage is not None:
            self.engine.set_rope_theta(self._stage.rope_theta)
        for sink in self.sinks:
            sink.rewind(self.step)
        self._event(bad + 1, "rewind", {"to_step": self.step, "left_out": [step + 1 for step in left_out]})

    def _metrics(self, stats: StepStats, factor: float, seconds: float, seq_len: int) -> dict[str, float]:
        rate = stats.weight / seconds
        metrics = {
            "train/loss": stats.loss,
            "train/lr": self.resolved_lr * factor,
            "train/grad_norm": stats.grad_norm,
            "train/tokens": float(self.tokens),
            "throughput/tokens_per_s": rate,
            "throughput/step_s": seconds,
        }
        if saving := self._keeper.take_seconds():
            metrics["throughput/checkpoint_s"] = saving
        if self._peak_flops and self._flops_per_token is not None:
            flops = rate * self._flops_per_token(seq_len)
            metrics["throughput/mfu"] = flops / (self._peak_flops * self.engine.topology.world_size)
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

    def _validate(self) -> dict[str, float]:
        self._watchdog.beat(f"validating after step {self.step}")
        values = bits_per_byte(self.engine, self.validation, self._watchdog.beat)
        self._write({f"validation/{held.metric}/{held.language}": values[held.language] for held in self.validation})
        for callback in self.callbacks:
            callback.after_validation(self.step, values)
        return values

    def _write(self, metrics: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(self.step, metrics)

    def _event(self, step: int, name: str, details: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.event(step, name, details)

    def _agree(self, reason: str | None) -> str | None:
        """A stop that any rank asks for is everyone's; a checkpoint that no rank is writing any more goes on."""
        self._watchdog.beat(f"waiting for the other ranks before step {self.step + 1}")
        place = self.engine.topology
        stop, pending = any_rank(place, self.engine.device, reason is not None, self._saver.pending)
        if not pending:
            self._keeper.advance()
        return first_reason(place, reason) if stop else None

    def _begin_save(self) -> SaveOutcome | None:
        state: dict[str, Any] = {
            "tokens": self.tokens,
            "global_batch": self.config.global_batch,
            "rows": self.rows,
            "sources": dict(self.sources),
            "loader": self.loader.state_dict(),
            "transforms": [transform.state_dict() for transform in self.transforms],
            "watch": self._watch.state_dict(),
        }
        if self._stage is not None:
            state["model"] = {"rope_theta": self._stage.rope_theta}
        counts = {"tokens": self.tokens, "samples": self.rows}
        return self._saver.begin(self.step, self.engine, state, self.resolved, self.inputs, counts)

    def _save(self, for_good: bool = False) -> None:
        self._watchdog.beat(f"saving the checkpoint of step {self.step}")
        save = self._keeper.save_for_good if for_good else self._keeper.save
        save(self.step, self._begin_save)
