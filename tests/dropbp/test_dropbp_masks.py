"""Masks: inclusion probabilities, counts, the published rule's own statistics, and where draws come from."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from hcx.dropbp import DropBPConfig, MaskSchedule
from hcx.dropbp.masks import settled
from hcx.errors import ConfigError

DRAWS = 10_000


def frequencies(schedule: MaskSchedule, draws: int = DRAWS) -> tuple[list[float], set[int]]:
    """How often each sublayer was dropped, and every count that came up."""
    counts, sizes = [0] * len(schedule.rates), set()
    for step in range(draws):
        mask = schedule.mask(step, step % 3)
        sizes.add(sum(mask))
        for index, dropped in enumerate(mask):
            counts[index] += dropped
    return [count / draws for count in counts], sizes


def assert_within_four_sigma(found: list[float], expected: tuple[float, ...], draws: int = DRAWS) -> None:
    for index, (frequency, p) in enumerate(zip(found, expected, strict=True)):
        assert abs(frequency - p) <= 4 * math.sqrt(p * (1 - p) / draws) + 1e-12, index


UNEVEN = (0.9, 0.1, 0.5, 0.3, 0.9, 0.8, 0.0, 0.5)


def test_exact_masks_have_one_count_and_the_given_inclusion_probabilities() -> None:
    schedule = MaskSchedule(3, UNEVEN, 0.5)
    found, sizes = frequencies(schedule)
    assert sizes == {schedule.count} == {4}
    assert schedule.probabilities == pytest.approx(UNEVEN)
    assert_within_four_sigma(found, UNEVEN)


def test_rates_that_sum_to_no_whole_number_are_moved_to_the_nearest_and_never_above_the_highest() -> None:
    rates = (0.9, 0.1, 0.5, 0.7, 0.9, 0.8, 0.3, 0.5)  # 4.7
    schedule = MaskSchedule(3, rates, 0.5)
    assert schedule.count == 5
    assert sum(schedule.probabilities) == pytest.approx(5)
    assert all(0.9 + 1e-12 >= moved >= rate for moved, rate in zip(schedule.probabilities, rates, strict=True))
    found, sizes = frequencies(schedule)
    assert sizes == {5}
    assert_within_four_sigma(found, schedule.probabilities)
    assert settled(rates, 4, 0.9) == pytest.approx([rate * 4 / 4.7 for rate in rates])


@pytest.mark.parametrize(("rate", "dropped"), [(0.0, 0), (0.5, 32), (0.75, 48), (0.875, 56)])
def test_equal_rates_drop_the_nearest_whole_number(rate: float, dropped: int) -> None:
    schedule = MaskSchedule(0, (rate,) * 64, rate)
    assert {sum(schedule.mask(step, 0)) for step in range(50)} == {dropped}


def test_pairs_of_sublayers_are_not_locked_together() -> None:
    # Systematic sampling without a shuffle would never drop two neighbours at p = 0.5.
    schedule = MaskSchedule(1, (0.5,) * 8, 0.5)
    together = sum(sum(schedule.mask(step, 0)[:2]) == 2 for step in range(2000)) / 2000
    # 4 of 8 at random: (4/8) (3/7).
    assert together == pytest.approx(3 / 14, abs=4 * math.sqrt(3 / 14 * 11 / 14 / 2000))


@pytest.mark.parametrize(("rate", "realised"), [(0.5, 0.525), (0.75, 0.771), (0.875, 0.891)])
def test_the_published_rule_drops_more_than_its_target(rate: float, realised: float) -> None:
    schedule = MaskSchedule(0, (rate,) * 64, rate, "reference")
    found, sizes = frequencies(schedule, 4000)
    assert sum(found) / 64 == pytest.approx(realised, abs=0.003)
    assert min(sizes) == math.ceil(64 * rate)
    # Ties are filled up from the first sublayer on.
    if rate == 0.5:
        assert sum(found[:8]) / 8 == pytest.approx(0.66, abs=0.02)
        assert sum(found[-8:]) / 8 == pytest.approx(0.495, abs=0.02)


def test_bernoulli_masks_follow_their_rates_without_a_fixed_count() -> None:
    rates = (0.2, 0.8, 0.5, 0.0, 0.9, 0.4)
    found, sizes = frequencies(MaskSchedule(0, rates, 0.5, "bernoulli"))
    assert_within_four_sigma(found, rates)
    assert len(sizes) > 3


@pytest.mark.parametrize("rule", ["exact", "reference", "bernoulli"])
def test_no_mask_drops_everything(rule: str) -> None:
    schedule = MaskSchedule(0, (0.9,) * 4, 0.9, rule)  # type: ignore[arg-type]
    assert max(sum(schedule.mask(step, 0)) for step in range(500)) == 3


def test_every_stage_drops_equally_many_and_draws_for_itself() -> None:
    schedule = MaskSchedule(5, (0.5,) * 16, 0.5, stages=4)
    patterns = set()
    for step in range(200):
        mask = schedule.mask(step, 0)
        parts = [mask[start : start + 4] for start in range(0, 16, 4)]
        assert [sum(part) for part in parts] == [2, 2, 2, 2]
        patterns.add(len(set(parts)))
    assert patterns > {1, 2}
    one = MaskSchedule(5, (0.5,) * 16, 0.5)
    assert any(len({sum(one.mask(step, 0)[s : s + 4]) for s in range(0, 16, 4)}) > 1 for step in range(20))


def test_a_mask_is_a_function_of_seed_step_and_micro_batch_alone() -> None:
    first, second = (MaskSchedule(7, UNEVEN, 0.5) for _ in range(2))
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    masks = [first.mask(step, micro) for step in range(20) for micro in range(2)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    assert masks == [second.mask(step, micro) for step in range(20) for micro in range(2)]
    assert masks != [MaskSchedule(8, UNEVEN, 0.5).mask(step, micro) for step in range(20) for micro in range(2)]
    even = MaskSchedule(7, (0.5,) * 16, 0.5)
    assert len({even.mask(0, micro) for micro in range(12)}) == len({even.mask(step, 0) for step in range(12)}) == 12


def test_a_mask_can_be_held_for_some_steps() -> None:
    schedule = MaskSchedule(0, UNEVEN, 0.5, hold_steps=3)
    masks = [schedule.mask(step, 0) for step in range(12)]
    assert all(masks[step] == masks[step - step % 3] for step in range(12))
    assert len(set(masks)) > 1


def test_stages_that_cut_the_model_unevenly_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dropbp.stages = 3: does not divide the model's 8"):
        MaskSchedule(0, UNEVEN, 0.5, stages=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 1.5}, "rate = 1.5; must be from 0 to 1"),
        ({"rate": -0.1}, "rate = -0.1; must be from 0 to 1"),
        ({"rate": float("nan")}, "rate = nan"),
        ({"rate": 0.95}, "rate = 0.95 is above cap = 0.9: no allocation can drop so much"),
        ({"rate": 1.0, "cap": 1.0}, "trains nothing"),
        ({"rate": 0.5, "floor": 0.6}, "floor = 0.6 is above rate"),
        ({"rate": 0.5, "hold_steps": 0}, "hold_steps = 0; must be at least 1"),
        ({"rate": 0.5, "mask_rule": "fixed"}, "exact"),
    ],
)
def test_settings_out_of_range_say_what_is_allowed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DropBPConfig(**values)  # type: ignore[arg-type]
