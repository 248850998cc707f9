"""What to do about a step whose loss or gradient is not finite, or far above what was usual.

The limits of a step are known before it: `median + sigmas * spread` over the last accepted steps, with the spread from
the median absolute deviation, which a few outliers do not move (Rousseeuw and Croux 1993: 1.4826 MAD estimates a normal
standard deviation). So the engine can refuse the update itself, and a resumed run judges as the first one did.

Going back (`rewind`) is what PaLM did at spikes (Chowdhery et al. 2022, section 5.1): load an earlier checkpoint and
leave out the batches around the spike. The order of the data stays a function of the step and the recorded list: step t
takes the samples it always takes, and a step on the list makes no update.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, Self

from pydantic import model_validator

from hcx.config import Config
from hcx.engine.base import StepStats

MAD_TO_SIGMA = 1.4826
SMALLEST_SPREAD = 0.02
"""Of the median: a loss that hardly moves does not make every small step up a spike."""


class ResilienceConfig(Config):
    """What happens at a bad step. `train.max_skipped_steps` bad steps in a row end the run in any case."""

    non_finite: Literal["skip", "rewind", "abort"] = "skip"
    """A loss or gradient norm that is NaN or infinite. The update is never made; `rewind` also goes back to the last
    good checkpoint and leaves the step out, `abort` saves and ends the run."""
    spike: Literal["ignore", "count", "skip", "rewind", "abort"] = "count"
    """A loss or gradient norm above its running limit. `count` makes the update and reports it; the others do not."""
    spike_sigmas: float = 10.0
    """The limit: this many robust standard deviations above the median."""
    spike_window: int = 100
    """Accepted steps that the limit is made from; before there are so many, nothing counts as a spike."""
    rewind_steps_left_out: int = 1
    """Steps left out after going back: the bad one and those that follow it."""
    max_rewinds: int = 3
    """Times that the run may go back before it ends."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.spike_sigmas <= 0:
            raise ValueError(f"spike_sigmas = {self.spike_sigmas}; must be above 0")
        if self.spike_window < 2:
            raise ValueError(f"spike_window = {self.spike_window}; must be at least 2")
        if self.rewind_steps_left_out < 1 or self.max_rewinds < 0:
            raise ValueError("rewind_steps_left_out must be at least 1, max_rewinds at least 0")
        return self

    @property
    def rewinds(self) -> bool:
        """Whether a checkpoint to go back to is needed from the start."""
        return "rewind" in (self.non_finite, self.spike)


class Action(IntEnum):
    """What to do after a step; the greatest that any rank wants is done by all."""

    ACCEPT = 0
    COUNT = 1
    SKIP = 2
    REWIND = 3
    ABORT = 4


@dataclass(frozen=True)
class Verdict:
    """Judgement of a step.

    Attributes:
        action: what to do.
        reason: what was found, with the numbers; empty for an accepted step.
    """

    action: Action
    reason: str = ""


class StepWatch:
    """Judges steps; its state is part of a checkpoint.

    Args:
        config: the policy.
        max_in_a_row: bad steps in a row that end the run.
    """

    def __init__(self, config: ResilienceConfig, max_in_a_row: int) -> None:
        self._config, self._max_in_a_row = config, max_in_a_row
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._norms: deque[float] = deque(maxlen=config.spike_window)
        self._in_a_row = 0
        self.left_out: set[int] = set()
        """Steps (counted from 0) that make no update."""
        self.rewinds = 0
        """Times that the run went back."""

    def limits(self) -> tuple[float, float]:
        """(loss, gradient norm) above which the coming step is a spike; infinite while too little is known."""
        if self._config.spike == "ignore" or len(self._losses) < self._config.spike_window:
            return math.inf, math.inf
        return self._limit(self._losses), self._limit(self._norms)

    def _limit(self, values: deque[float]) -> float:
        median = statistics.median(values)
        spread = MAD_TO_SIGMA * statistics.median(abs(value - median) for value in values)
        return median + self._config.spike_sigmas * max(spread, SMALLEST_SPREAD * abs(median))

    def engine_limits(self) -> tuple[float, float]:
        """The limits above which the engine shall make no update."""
        return (math.inf, math.inf) if self._config.spike in ("ignore", "count") else self.limits()

    def judge(self, stats: StepStats, limits: tuple[float, float]) -> Verdict:
        """What to do after a step; `limits` are those that held for it."""
        loss, norm = stats.loss, stats.grad_norm
        finite = math.isfinite(loss) and math.isfinite(norm)
        if stats.weight == 0:
            verdict = Verdict(Action.SKIP, "the batch has no targets")
        elif not finite or (stats.skipped and loss <= limits[0] and norm <= limits[1]):
            action = Action[self._config.non_finite.upper()]
            verdict = Verdict(action, f"loss {loss:.6g}, gradient norm {norm:.6g}: not finite")
        elif loss > limits[0] or norm > limits[1]:
            which = f"loss {loss:.6g} above {limits[0]:.6g}" if loss > limits[0] else ""
            other = f"gradient norm {norm:.6g} above {limits[1]:.6g}" if norm > limits[1] else ""
            verdict = Verdict(Action[self._config.spike.upper()], "spike: " + ", ".join(filter(None, (which, other))))
        else:
            verdict = Verdict(Action.ACCEPT)
        if verdict.action <= Action.COUNT:
            # A counted spike is part of the run: the limit follows where the run goes.
            self._losses.append(loss)
            self._norms.append(norm)
        self._in_a_row = 0 if verdict.action <= Action.COUNT else self._in_a_row + 1
        if self._in_a_row >= self._max_in_a_row:
            return Verdict(Action.ABORT, f"{self._in_a_row} bad steps in a row, the last one: {verdict.reason}")
        if verdict.action is Action.REWIND and self.rewinds >= self._config.max_rewinds:
            return Verdict(Action.ABORT, f"went back {self.rewinds} times already (max_rewinds); {verdict.reason}")
        return verdict

    def leave_out(self, step: int) -> list[int]:
        """Going back because of `step` (counted from 0): the steps that are left out from now on."""
        self.rewinds += 1
        chosen = list(range(step, step + self._config.rewind_steps_left_out))
        self.left_out.update(chosen)
        return chosen

    def forget(self) -> None:
        """The run changes so that earlier losses say nothing about later ones (another sequence length)."""
        self._losses.clear()
        self._norms.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "in_a_row": self._in_a_row,
            "left_out": sorted(self.left_out),
            "rewinds": self.rewinds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`; what was left out since, and how often the run went back, is kept."""
        self.forget()
        self._losses.extend(state.get("losses", ()))
        self._norms.extend(state.get("norms", ()))
        self._in_a_row = int(state.get("in_a_row", 0))
        self.left_out.update(state.get("left_out", ()))
        self.rewinds = max(self.rewinds, int(state.get("rewinds", 0)))
