"""Regularisation events between optimizer steps, on any engine, through the fp32 masters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hcx.compress.regularise.config import (
    PACKED_RULES,
    AnyRule,
    LowRankRule,
    NoiseRule,
    PruneRule,
    RegulariseConfig,
    WeightDecayRule,
    require_plan,
)
from hcx.compress.regularise.planes import PlaneStore
from hcx.compress.regularise.rules import add_noise, decay, global_threshold, low_rank, pack, prune, prune_below
from hcx.compress.regularise.schedule import EventSchedule
from hcx.compress.regularise.straight_through import use_straight_through
from hcx.errors import CheckpointError
from hcx.kernels import PackedWeight
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.parts.base import PlainParts
from hcx.model.transforms import EditsMasters, ModelTransform, TransformContext
from hcx.obs import get_logger

log = get_logger(__name__)


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Module -> global shape, of every matrix of a model."""
    decoder = Decoder(config, PlainParts(device="meta"))
    return {
        block.name.removesuffix(".weight"): block.global_shape
        for blocks in decoder.parameter_map().values()
        for block in blocks
        if len(block.global_shape) == 2
    }


class Regularise(ModelTransform):
    """Replaces masters by their compressed version at events, and keeps the planes of the last one.

    Args:
        config: the recipe's section.
        model: the decoder.
        total_steps: of the run.
        lr: step, counted from 0 -> learning rate.
        lr_factor: step, counted from 0 -> factor of the peak learning rate.
        lr_warmup_steps: warm-up of the learning rate.
        seed: of the noise.
        store: where rank 0 writes the planes of the last event; None: nowhere.

    Raises:
        ConfigError: the plan does not fit the model.
    """

    def __init__(
        self,
        config: RegulariseConfig,
        model: ModelConfig,
        total_steps: int,
        lr: Callable[[int], float],
        lr_factor: Callable[[int], float],
        lr_warmup_steps: int = 0,
        seed: int = 0,
        store: PlaneStore | None = None,
    ) -> None:
        shapes = matrix_shapes(model)
        require_plan(config, shapes, model.tie_embeddings)
        self._config, self._lr, self._seed, self._store = config, lr, seed, store
        self.schedule = EventSchedule(config, total_steps, lr_factor, lr_warmup_steps)
        self._rules = config.rules(list(shapes))
        self._is_first_rank = True
        self._events = 0
        self._last = -1
        """Optimizer steps at the last event; -1: none yet."""
        self._ended_at = -1
        """Optimizer steps at the event that ended the run; -1: not yet."""
        self._began = 0.0
        self._step_seconds = 0.0
        self.packed: dict[str, PackedWeight] = {}
        """Planes of the last event of the run, on rank 0."""

    def apply(self, chunk: nn.Module, context: TransformContext) -> None:
        """See `ModelTransform.apply`."""
        self._is_first_rank = context.topology.rank == 0
        if self._config.method == "straight_through":
            use_straight_through(cast(Decoder, chunk), self._rules)

    def before_step(self, step: int) -> None:
        """See `ModelTransform.before_step`."""
        self._began = time.perf_counter()

    def after_step(self, step: int, engine: EditsMasters) -> dict[str, float]:
        """See `ModelTransform.after_step`. Steps that made no update do not count."""
        self._step_seconds += time.perf_counter() - self._began
        done = _steps_made(engine)
        last = step + 1 == self.schedule.total_steps
        # The last event is made even where no update came after the one before it: only it leaves the planes.
        if not last and (done == self._last or not self.schedule.is_event(done)):
            return {}
        if last and done == self._ended_at:
            return {}
        return self._event(done, step, last, engine)

    def finalize(self, engine: EditsMasters) -> None:
        """See `ModelTransform.finalize`. Where the last step was left out, its event is still to come."""
        done = _steps_made(engine)
        if done != self._ended_at:
            self._event(done, self.schedule.total_steps - 1, True, engine)

    def _event(self, done: int, step: int, last: bool, engine: EditsMasters) -> dict[str, float]:
        begun = time.perf_counter()
        between = self.schedule.since_last(done)
        thresholds = self._thresholds(done, last, engine)
        packed: dict[str, PackedWeight] = {}
        moved = size = 0.0

        def edit(name: str, master: Tensor, state: dict[str, Tensor]) -> Tensor:
            nonlocal moved, size
            stem = name.removesuffix(".weight")
            rule = self._rules[stem]
            if isinstance(rule, PACKED_RULES):
                weight = pack(rule, master, last)
                edited = weight.dequantize(torch.float32)
                if last and self._is_first_rank:
                    packed[stem] = weight.to("cpu")
            else:
                edited = self._dense(rule, stem, master, done, step, last, thresholds)
            moved += float((edited - master).double().square().sum())
            size += float(master.double().square().sum())
            return edited

        engine.edit_masters([f"{stem}.weight" for stem in self._rules], edit)
        self._events += 1
        self._last = done
        if last:
            self._ended_at = done
        if last and packed:
            self.packed = packed
            if self._store is not None:
                self._store.write(packed, step + 1)
        seconds = time.perf_counter() - begun
        relative = math.sqrt(moved / size) if size else 0.0
        metrics = {
            "regularise/events": float(self._events),
            "regularise/event_size": relative,
            "regularise/strength": relative / max(1, between),
            "regularise/steps_between": float(between),
            "regularise/event_s": seconds,
            "regularise/cost": seconds / self._step_seconds if self._step_seconds else 0.0,
        }
        self._step_seconds = 0.0
        if last:
            log.info(
                "%d regularisation events; the last one moved the weights by %.3g of their norm", self._events, relative
            )
        return metrics

    def _dense(
        self,
        rule: AnyRule,
        stem: str,
        master: Tensor,
        done: int,
        step: int,
        last: bool,
        thresholds: dict[AnyRule, tuple[Tensor, int]],
    ) -> Tensor:
        if isinstance(rule, WeightDecayRule):
            return decay(master, self._lr(step), rule.strength)
        if isinstance(rule, NoiseRule):
            return add_noise(master, rule.amplitude, self._seed, done, stem)
        since_warmup = done - self.schedule.warmup_steps
        if isinstance(rule, LowRankRule):
            return low_rank(rule, master, since_warmup, last)
        if not isinstance(rule, PruneRule):
            raise TypeError(f"no rule of kind {rule.kind}")
        if rule not in thresholds:
            return prune(master, round(rule.fraction_at(since_warmup, last) * master.numel()))
        threshold, ties = thresholds[rule]
        edited, ties = prune_below(master, threshold.to(master.device), ties)
        thresholds[rule] = (threshold, ties)
        return edited

    def _thresholds(self, done: int, last: bool, engine: EditsMasters) -> dict[AnyRule, tuple[Tensor, int]]:
        """Thresholds of the pruning rules that have one over all their weights."""
        found: dict[AnyRule, tuple[Tensor, int]] = {}
        for rule in dict.fromkeys(self._rules.values()):
            if not isinstance(rule, PruneRule) or rule.scope != "global":
                continue
            names = [f"{stem}.weight" for stem, other in self._rules.items() if other == rule]
            total = 0

            def visit(fn: Callable[[Tensor], None], names: list[str] = names) -> None:
                nonlocal total
                total = 0

                def read(name: str, master: Tensor, state: dict[str, Tensor]) -> None:
                    nonlocal total
                    total += master.numel()
                    fn(master)

                engine.edit_masters(names, read)

            visit(lambda master: None)
            count = round(rule.fraction_at(done - self.schedule.warmup_steps, last) * total)
            found[rule] = global_threshold(visit, count) if count else (torch.tensor(0.0), 0)
        return found

    def state_dict(self) -> dict[str, Any]:
        """See `ModelTransform.state_dict`."""
        return {
            "config": self._config.model_dump(mode="json"),
            "events": self._events,
            "last": self._last,
            "ended_at": self._ended_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ModelTransform.load_state_dict`.

        Raises:
            CheckpointError: the checkpoint was written under another section of the recipe.
        """
        mine = self._config.model_dump(mode="json")
        changed = sorted(key for key in mine if state.get("config", mine).get(key) != mine[key])
        if changed:
            key = changed[0]
            raise CheckpointError(
                f"regularise.{key} was {state['config'].get(key)} when the checkpoint was written, now {mine[key]}; "
                "keep the section, or start another run from the model (init_from)"
            )
        self._events, self._last = int(state.get("events", 0)), int(state.get("last", -1))
        self._ended_at = int(state.get("ended_at", -1))


def _steps_made(engine: EditsMasters) -> int:
    return int(engine.scalars()["optimizer_steps"])
