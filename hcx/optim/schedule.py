"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to lose on resume."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import model_validator

from hcx.config import Config


class Schedule(Config):
    """A warm-up, then one of three shapes."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """`wsd`: warm-up, stable, decay; `cosine`: a half cosine over all steps; `constant`."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly."""
    decay_fraction: float = 0.2
    """wsd: the part of all steps, at the end, over which the rate falls linearly."""
    min_factor: float = 0.0
    """The rate at the end, as a factor of the peak."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps = {self.warmup_steps}; must be at least 0")
        if not 0 <= self.decay_fraction <= 1 or not 0 <= self.min_factor <= 1:
            raise ValueError("decay_fraction and min_factor must lie in [0, 1]")
        return self


def lr_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate for optimizer step `step` of `0 .. total_steps - 1`.

    The first step already moves (`1 / warmup_steps`), and the last one is the smallest of the decay, above
    `min_factor`, so that no step is wasted at a rate of zero.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        length = max(1, total_steps - schedule.warmup_steps)
        done = min(1.0, (step - schedule.warmup_steps) / length)
        shape = 0.5 * (1 + math.cos(math.pi * done))
    else:
        length = round(total_steps * schedule.decay_fraction)
        shape = 1.0 if length == 0 else min(1.0, max(0.0, (total_steps - step) / length))
    return schedule.min_factor + (1 - schedule.min_factor) * shape
