"""Which weight gets how many bits: the exact answer under a budget.

One choice per item, costs that add up, losses that add up: the multiple-choice knapsack. Solved by dynamic programming
over the efficient combinations (cost, loss) of a prefix of the items: a combination that costs no less and loses no
less than another is never part of an optimum, whatever follows (Nemhauser and Ullmann, 1969). Costs are whole numbers,
so there are at most as many as the budget has units, and usually few: matrices have few sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from hcx.errors import ConfigError

MAX_COMBINATIONS = 20_000_000
"""Efficient combinations over all items, before it is better to choose by groups of layers."""


@dataclass(frozen=True)
class Choice:
    """One way to store an item.

    Attributes:
        bits: planes, or whatever tells the choices of an item apart.
        cost: what it takes from the budget, in whole units (bits or bytes).
        loss: what it adds to the loss; may be negative.
    """

    bits: int
    cost: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """The best plan under a budget.

    Attributes:
        choices: by item.
        cost: their sum.
        loss: their sum.
    """

    choices: dict[str, Choice]
    cost: int
    loss: float

    @property
    def bits(self) -> dict[str, int]:
        """Bits by item."""
        return {name: choice.bits for name, choice in self.choices.items()}


def allocate(items: Mapping[str, Sequence[Choice]], budget: int) -> Allocation:
    """One choice per item, of least total loss among those whose total cost is within the budget; of equal losses the
    cheaper.

    Args:
        items: name -> choices, at least one.
        budget: in the units of `Choice.cost`.

    Raises:
        ConfigError: an item has no choice, a number is not usable, the cheapest choices exceed the budget, or there are
            too many combinations to keep.
    """
    if not items:
        raise ConfigError("nothing to allocate bits to")
    for name, choices in items.items():
        if not choices:
            raise ConfigError(f"{name}: no choices")
        for choice in choices:
            if choice.cost < 0 or not np.isfinite(choice.loss):
                raise ConfigError(f"{name}: cost {choice.cost}, loss {choice.loss} at {choice.bits} bits; not usable")
    least = sum(min(choice.cost for choice in choices) for choices in items.values())
    if least > budget:
        raise ConfigError(f"a budget of {budget:,} is not met by the cheapest choices, which take {least:,}")
    unit = gcd(*(choice.cost for choices in items.values() for choice in choices)) or 1
    # What later items take at the least is not there for earlier ones.
    reserve, stages = least, []
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    total = 0
    for name, choices in items.items():
        reserve -= min(choice.cost for choice in choices)
        costs, losses, stage = _extend(costs, losses, choices, unit, (budget - reserve) // unit)
        total += len(costs)
        if total > MAX_COMBINATIONS:
            raise ConfigError(
                f"more than {MAX_COMBINATIONS:,} efficient combinations up to {name}; allocate by type of layer, or "
                "round costs to a coarser unit"
            )
        stages.append(stage)
    # Efficient combinations fall in loss as they rise in cost.
    at = len(costs) - 1
    chosen: dict[str, Choice] = {}
    for (name, choices), (parents, picks) in reversed(list(zip(items.items(), stages, strict=True))):
        chosen[name] = choices[int(picks[at])]
        at = int(parents[at])
    ordered = {name: chosen[name] for name in items}
    return Allocation(ordered, sum(c.cost for c in ordered.values()), float(sum(c.loss for c in ordered.values())))


def _extend(
    costs: NDArray[np.int64], losses: NDArray[np.float64], choices: Sequence[Choice], unit: int, limit: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All combinations with one more item that are efficient and within the limit, and where each came from."""
    every_cost = np.concatenate([costs + choice.cost // unit for choice in choices])
    every_loss = np.concatenate([losses + choice.loss for choice in choices])
    inside = np.flatnonzero(every_cost <= limit)
    order = inside[np.lexsort((every_loss[inside], every_cost[inside]))]
    sorted_losses = every_loss[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_losses)[:-1]])
    kept = order[sorted_losses < before]
    return every_cost[kept], every_loss[kept], (kept % len(costs), kept // len(costs))
