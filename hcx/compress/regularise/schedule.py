"""When events happen: a pure function of the number of optimizer steps made, so a resume needs nothing else."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable

from hcx.compress.regularise.config import RegulariseConfig


class EventSchedule:
    """The steps after which the masters are compressed.

    Args:
        config: period and warm-up.
        total_steps: of the run.
        lr_factor: step, counted from 0 -> factor of the peak learning rate.
        lr_warmup_steps: warm-up of the learning rate, which is this schedule's unless `config` says otherwise.
    """

    def __init__(
        self, config: RegulariseConfig, total_steps: int, lr_factor: Callable[[int], float], lr_warmup_steps: int
    ) -> None:
        self.total_steps = total_steps
        self.warmup_steps = lr_warmup_steps if config.warmup_steps is None else config.warmup_steps
        self._steps = [] if config.method == "straight_through" else self._events(config, lr_factor)

    def _events(self, config: RegulariseConfig, lr_factor: Callable[[int], float]) -> list[int]:
        after_warmup = range(self.warmup_steps + 1, self.total_steps + 1)
        if config.period != "lr_scaled":
            return [step for step in after_warmup if step % config.period == 0]
        # One event for every `base_period` of learning rate that has passed, in units of its peak.
        passed = [0.0, *itertools.accumulate(lr_factor(step) for step in range(self.total_steps))]
        phase = [int(value / config.base_period + 1e-9) for value in passed]
        return [step for step in after_warmup if phase[step] > phase[step - 1]]

    def is_event(self, done: int) -> bool:
        """Whether there is an event after `done` steps; the run's last step is one beside these."""
        place = bisect.bisect_left(self._steps, done)
        return place < len(self._steps) and self._steps[place] == done

    def since_last(self, done: int) -> int:
        """Steps since the event before that of `done`, or since the run's start."""
        place = bisect.bisect_left(self._steps, done)
        return done - (self._steps[place - 1] if place else 0)

    def steps(self) -> list[int]:
        """Every step with an event, the last step of the run included."""
        return sorted({*self._steps, self.total_steps})
