"""Allocation under a budget of operations, against a hand-computed example and a plain-loop reading of the rule."""

from __future__ import annotations

import pytest
import torch

from hcx.dropbp.allocation import allocate, usable
from hcx.errors import ConfigError


def test_a_hand_computed_example_of_four_sublayers() -> None:
    # Sensitivities 1, 2, 4, 8 and operations 1, 2, 1, 2 (of 6); 0.3 of the operations go, that is 1.8.
    # Keys 1 (p + .1) etc.: .1 .2 .4 .8 at first. Grants, in order, with the running sum of what was dropped:
    #   s0 .1 (0.1), s0 .2 / s1 .1 tie -> s0 (0.2), s1 .1 (0.4), s0 .3 (0.5), s0 .4 / s1 .2 / s2 .1 tie -> s0 (0.6),
    #   s1 (0.8), s2 (0.9), s0 .5 (1.0), s0 .6 / s1 .3 tie -> s0 (1.1), s1 (1.3), s0 .7 (1.4),
    #   s0 .8 / s1 .4 / s2 .2 / s3 .1 tie -> s0 (1.5), s1 (1.7), s2 (1.8): the budget is met before s3 gets anything.
    assert allocate([1, 2, 4, 8], [1, 2, 1, 2], 0.3) == pytest.approx([0.8, 0.4, 0.2, 0.0])


def plain_loop(sensitivity: list[float], flops: list[float], rate: float) -> list[float]:
    """The rule of the paper's code as it reads, with whole tenths."""
    tenths = [0] * len(flops)
    while sum(f * (10 - t) for f, t in zip(flops, tenths, strict=True)) > (1 - rate) * 10 * sum(flops) * (1 + 1e-9):
        open_ = [s for s in range(len(flops)) if tenths[s] < 9]
        tenths[min(open_, key=lambda s: (sensitivity[s] * (tenths[s] + 1), s))] += 1
    return [t / 10 for t in tenths]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75, 0.875, 0.9])
def test_the_heap_is_the_plain_loop_and_the_budget_holds(rate: float) -> None:
    generator = torch.Generator().manual_seed(4)
    sensitivity = torch.rand(32, generator=generator, dtype=torch.float64).pow(4).tolist()
    flops = torch.randint(1, 100, (32,), generator=generator).double().tolist()
    rates = allocate(sensitivity, flops, rate)
    assert rates == pytest.approx(plain_loop(sensitivity, flops, rate))
    kept = sum(f * (1 - p) for f, p in zip(flops, rates, strict=True))
    assert kept <= (1 - rate) * sum(flops) * (1 + 1e-9)
    assert max(rates) <= 0.9
    # Not a grant more than needed: the last one of 0.1 at the largest sublayer bounds the excess.
    assert kept > (1 - rate) * sum(flops) - 0.1 * max(flops) - 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1 / 3, 1 / sum(range(1, 9)), 1.0, 7e14])
def test_only_proportions_of_the_operations_count(scale: float) -> None:
    # The published code truncates the target to a whole number: ratios would then drive every rate to the cap.
    flops = [float(index) for index in range(1, 9)]
    sensitivity = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0, 3.5]
    whole = allocate(sensitivity, flops, 0.5)
    assert allocate(sensitivity, [scale * value for value in flops], 0.5) == whole
    assert max(whole) < 0.9 or min(whole) < 0.5


def test_less_sensitive_sublayers_are_dropped_more_and_the_product_is_evened_out() -> None:
    sensitivity = [1.0, 2.0, 4.0, 8.0]
    rates = allocate(sensitivity, [1.0] * 4, 0.3)
    assert rates == sorted(rates, reverse=True)
    products = [c * p for c, p in zip(sensitivity, rates, strict=True)]
    assert max(products) - min(p for p, r in zip(products, rates, strict=True) if r < 0.9) <= 0.8


def test_the_floor_and_the_cap_bound_every_rate() -> None:
    rates = allocate([1.0, 1e6, 1e6, 1e6], [1.0] * 4, 0.5, floor=0.25, cap=0.8)
    assert rates[0] == 0.8
    assert min(rates) >= 0.25
    assert allocate([1.0] * 4, [1.0] * 4, 0.95, cap=1.0) == [1.0, 1.0, 0.9, 0.9]


def test_weighing_by_operations_drops_expensive_sublayers_first() -> None:
    # As published, the cheap one is dropped most although that saves little; per operation, it is left alone.
    assert allocate([1.0, 1.5], [1.0, 10.0], 0.5) == [0.7, 0.5]
    assert allocate([1.0, 1.5], [1.0, 10.0], 0.5, flops_aware=True) == [0.0, 0.6]


def test_a_rate_above_the_cap_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"dropbp.rate = 0.92: with dropbp.cap = 0.9 .* lower the rate or raise"):
        allocate([1.0] * 4, [1.0] * 4, 0.92)


def test_sensitivities_that_say_nothing_are_recognised() -> None:
    assert usable([0.0, 1.0])
    assert not usable([0.0, 0.0])
    assert not usable([1.0, float("nan")])
    assert not usable([1.0, float("inf")])
