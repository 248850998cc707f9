"""From sensitivities to drop rates under a budget of operations: the greedy of the authors' code, its traps mended."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from hcx.errors import ConfigError

UNIT = 1000
"""Rates are whole thousandths here: nine additions of 0.1 in floating point are not 0.9."""
STEP = 100
"""By how much a rate grows at a time: 0.1."""


def usable(sensitivity: Sequence[float]) -> bool:
    """Whether sensitivities say anything: all are finite, none is negative, and not all are zero."""
    return all(math.isfinite(value) and value >= 0 for value in sensitivity) and any(sensitivity)


def allocate(
    sensitivity: Sequence[float],
    flops: Sequence[float],
    rate: float,
    floor: float = 0.0,
    cap: float = 0.9,
    flops_aware: bool = False,
) -> list[float]:
    """Drop rates that fit the budget `sum of flops * (1 - rate)` and keep the largest `sensitivity * rate` small.

    The sublayer with the smallest `sensitivity * (p + 0.1)` gets 0.1 more, until the kept operations fit (Woo et al.
    2024, section 3.3, and their code). Only the proportions of `flops` count.

    Args:
        sensitivity: of each sublayer; see `usable`.
        flops: operations of each sublayer, in any unit.
        rate: share of the operations to drop.
        floor, cap: bounds of a sublayer's rate.
        flops_aware: divide the key by the sublayer's operations (not published).

    Raises:
        ConfigError: no rates up to the cap fit the budget.
    """
    if len(sensitivity) != len(flops):
        raise ValueError(f"{len(sensitivity)} sensitivities of {len(flops)} sublayers")
    if rate > cap:
        raise ConfigError(
            f"dropbp.rate = {rate:g}: with dropbp.cap = {cap:g} at most {cap:.0%} of the operations can be dropped; "
            "lower the rate or raise the cap"
        )
    rates, highest = [round(floor * UNIT)] * len(flops), round(cap * UNIT)
    total = math.fsum(flops)
    # Relative to the total: kept work that equals the target but for rounding is within it.
    target = (1.0 - rate) * total * UNIT + 1e-9 * total * UNIT

    def key(index: int) -> float:
        grown = sensitivity[index] * (rates[index] + STEP)
        return grown / flops[index] if flops_aware else grown

    queue = [(key(index), index) for index in range(len(flops)) if rates[index] < highest]
    heapq.heapify(queue)
    while math.fsum(f * (UNIT - r) for f, r in zip(flops, rates, strict=True)) > target:
        if not queue:
            raise ConfigError(
                f"dropbp.rate = {rate:g}: even with every rate at dropbp.cap = {cap:g} the budget is not met"
            )
        _, index = heapq.heappop(queue)
        rates[index] = min(highest, rates[index] + STEP)
        if rates[index] < highest:
            heapq.heappush(queue, (key(index), index))
    return [value / UNIT for value in rates]
