"""Which sublayers a micro-batch drops, as a function of seed, step, micro-batch and pipeline stage.

Draws come from generators of their own, so that DropBP moves neither dropout nor the order of the data, and a resumed
run draws the same masks. A mask is never a function of the data-parallel rank, and every rank computes the mask of the
whole model: the collectives inside a sublayer's backward would wait forever otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator

from hcx.dist import derived_generator
from hcx.errors import ConfigError

Rule = Literal["exact", "reference", "bernoulli"]
Mask = tuple[bool, ...]
"""One bool per sublayer, True: dropped."""


def settled(rates: Sequence[float], count: int, ceiling: float) -> list[float]:
    """Rates moved so that they sum to `count`, as exactly `count` drops need.

    Up in proportion to what is left below `ceiling` (which no rate may be above), down in proportion to themselves.
    Rates that sum to `count` stay.
    """
    total = math.fsum(rates)
    if max(rates) == min(rates):
        return [count / len(rates)] * len(rates)
    if count > total:
        room = len(rates) * ceiling - total
        return [rate + (ceiling - rate) * (count - total) / room for rate in rates]
    return [rate * count / total for rate in rates]


def systematic(rates: Sequence[float], count: int, generator: Generator) -> Mask:
    """Exactly `count` drops with inclusion probabilities `rates`, which must sum to `count`.

    Systematic sampling over a shuffled order (Madow 1949): unit i is taken when an integer lies between the partial
    sums before and after it, all shifted by one uniform number. Each probability is at most 1, so no unit comes twice.
    """
    order = torch.randperm(len(rates), generator=generator).tolist()
    shift = float(torch.rand((), dtype=torch.float64, generator=generator))
    dropped = [False] * len(rates)
    partial, passed = 0.0, 0
    for place, index in enumerate(order):
        # The last sum is the count itself, whatever rounding made of it.
        partial = float(count) if place == len(order) - 1 else partial + rates[index]
        reached = min(count, math.ceil(partial - shift))
        dropped[index] = reached > passed
        passed = max(passed, reached)
    return tuple(dropped)


def bernoulli(rates: Sequence[float], generator: Generator) -> Mask:
    """Each sublayer by itself."""
    draws = torch.rand(len(rates), dtype=torch.float64, generator=generator).tolist()
    return tuple(draw < rate for draw, rate in zip(draws, rates, strict=True))


def reference(rates: Sequence[float], target: float, generator: Generator) -> Mask:
    """The authors' rule: Bernoulli draws, then more drops in decreasing order of rate until the share reaches `target`.

    The order is stable, so equal rates are filled up from the first sublayer on. The correction has one side only.
    """
    dropped = list(bernoulli(rates, generator))
    for index in sorted(range(len(rates)), key=lambda index: -rates[index]):
        if sum(dropped) / len(dropped) >= target:
            break
        dropped[index] = True
    return tuple(dropped)


@dataclass(frozen=True)
class MaskSchedule:
    """The masks of a run.

    Args:
        seed: of the run.
        rates: wanted drop rate of each sublayer.
        target: average drop rate that the user asked for.
        rule: how masks are drawn.
        stages: equal parts of the model, in order, each of which drops equally many sublayers.
        hold_steps: steps for which a mask stays.

    Attributes:
        count: sublayers that each stage drops (rule `exact`): the whole number nearest to the sum of its rates. At
            least one sublayer of each stage is kept.
        probabilities: inclusion probabilities of the rule `exact`.
    """

    seed: int
    rates: tuple[float, ...]
    target: float
    rule: Rule = "exact"
    stages: int = 1
    hold_steps: int = 1
    count: int = field(init=False)
    probabilities: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.rates or len(self.rates) % self.stages:
            raise ConfigError(
                f"dropbp.stages = {self.stages}: does not divide the model's {len(self.rates)} residual sublayers"
            )
        size = len(self.rates) // self.stages
        parts = [self.rates[start : start + size] for start in range(0, len(self.rates), size)]
        equal = max(self.rates) == min(self.rates)
        wanted = self.target * size if equal else math.fsum(self.rates) / self.stages
        # 1e-9: sums of tenths are not exact.
        count = math.floor(wanted + 0.5 + 1e-9)
        most = size - 1 if equal else min(size - 1, math.floor(size * max(self.rates) + 1e-9))
        count = max(0, min(count, most))
        object.__setattr__(self, "count", count)
        object.__setattr__(
            self, "probabilities", tuple(p for part in parts for p in settled(part, count, max(self.rates)))
        )

    def mask(self, step: int, micro_batch: int) -> Mask:
        """The mask of the whole model for one micro-batch of one step."""
        size = len(self.rates) // self.stages
        whole: list[bool] = []
        for stage in range(self.stages):
            generator = derived_generator(self.seed, "dropbp", step // self.hold_steps, micro_batch, stage)
            chosen = slice(stage * size, (stage + 1) * size)
            drawn = list(self._draw(self.rates[chosen], self.probabilities[chosen], generator))
            if all(drawn):
                # A branch is kept at random: with everything dropped, a frozen head would leave no gradient at all.
                drawn[int(torch.randint(size, (), generator=generator))] = False
            whole += drawn
        return tuple(whole)

    def _draw(self, rates: Sequence[float], probabilities: Sequence[float], generator: Generator) -> Mask:
        if self.rule == "exact":
            return systematic(probabilities, self.count, generator)
        if self.rule == "reference":
            return reference(rates, self.target, generator)
        return bernoulli(rates, generator)


def uneven_stages(stages: int, pipeline: int, chunks: int) -> str | None:
    """Why masks drawn in so many parts of the model do not drop equally on every pipeline stage; None if they do.

    Args:
        stages: parts that each drop equally many sublayers.
        pipeline: pipeline stages.
        chunks: of each pipeline stage; they lie apart in the model, so that every one must drop equally.
    """
    if stages % (pipeline * chunks) == 0:
        return None
    virtual = f" x virtual_pipeline_parallel = {chunks}" if chunks > 1 else ""
    return (
        f"dropbp.stages = {stages}: must be a multiple of engine.pipeline_parallel = {pipeline}{virtual}, so that "
        "every stage drops equally many sublayers"
    )
