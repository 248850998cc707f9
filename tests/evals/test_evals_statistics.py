"""Standard errors and intervals on data whose errors are known."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from hcx.evals.statistics import Estimate, accuracy, bootstrap, ratio, sign_flips, student_t95, wilson


def test_standard_error_of_an_accuracy_is_the_sample_standard_error():
    correct = [1.0] * 30 + [0.0] * 70
    estimate = accuracy(correct, chance=0.25)
    assert estimate.value == pytest.approx(0.3)
    assert estimate.stderr == pytest.approx(np.std(correct, ddof=1) / math.sqrt(100))


def test_wilson_interval_equals_the_published_example():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263 and 0/20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(("right", "contains"), [(57, True), (100, False), (30, False)])
def test_a_score_is_marked_when_its_interval_contains_chance(right, contains):
    estimate = accuracy([1.0] * right + [0.0] * (225 - right), chance=0.25)
    assert estimate.contains_chance is contains
    assert estimate.to_json()["contains_chance"] is contains


def test_where_chance_is_undefined_nothing_is_claimed():
    assert ratio([8.0, 4.0, 6.0], [4, 4, 4]).contains_chance is None


def test_one_item_has_no_error_estimate():
    estimate = accuracy([1.0], chance=0.25)
    assert (estimate.stderr, estimate.interval, estimate.contains_chance) == (None, None, None)
    assert ratio([8.0], [4]).stderr is None


def test_a_ratio_is_all_bits_over_all_bytes_and_not_the_mean_of_ratios():
    assert ratio([10.0, 90.0], [10, 30]).value == pytest.approx(100 / 40)


def test_bootstrap_error_of_a_mean_is_near_its_theoretical_error():
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    estimate = ratio(values, np.ones(400))
    theory = values.std(ddof=1) / math.sqrt(400)
    # A standard error from 1000 resamples has itself an error of about 2 %.
    assert estimate.stderr == pytest.approx(theory, rel=0.1)
    low, high = estimate.interval
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * theory, rel=0.12)


def test_bootstrap_is_the_same_every_time():
    rows = np.arange(20.0).reshape(-1, 1)
    first, second = (bootstrap(rows, lambda r: float(r.mean())) for _ in range(2))
    assert first == second


def test_a_ratio_of_equal_documents_has_no_spread():
    estimate = ratio([8.0] * 5, [4] * 5)
    assert estimate.stderr == 0.0
    assert estimate.interval == (2.0, 2.0)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (5, 2.5706), (10, 2.2281), (30, 2.0423), (200, 1.9719)]
)
def test_quantiles_of_students_t_equal_the_tables(freedom, quantile):
    assert student_t95(freedom) == pytest.approx(quantile, abs=4e-4)


@pytest.mark.parametrize("items", [8, 60])
def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say(items):
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        rows = generator.normal(5.0, 1.0, size=(items, 1))
        low, high = bootstrap(rows, lambda r: float(r.mean()), resamples=400).interval
        hits += low <= 5.0 <= high
    # 95 % nominal; 200 trials have a standard error of 1.5 %.
    assert 0.90 <= hits / 200 <= 0.99


def test_sign_flips_of_few_pairs_are_counted_by_hand():
    # Of the 8 sums of +-1 +-2 +-4, only 7 and -7 reach 7, and four reach 5.
    assert sign_flips([1.0, 2.0, 4.0])[0] == 2 / 8
    assert sign_flips([-1.0, 2.0, 4.0])[0] == 4 / 8


def test_sign_flips_of_many_pairs_come_near_the_normal_approximation_in_any_order():
    noise = np.random.default_rng(0).standard_normal(40)
    z = abs(noise.sum()) / math.sqrt((noise**2).sum())
    found, test = sign_flips(noise)
    assert found == pytest.approx(2 - 2 * NormalDist().cdf(z), abs=0.03)
    assert test == "sign flips, 10000"
    shifted = noise + 1.5
    assert sign_flips(shifted)[0] == sign_flips(shifted[::-1])[0] == 1 / 10_000


def test_one_at_chance_exactly_is_marked_however_sums_round():
    third = sum([1.0 / 3] * 3) / 3
    assert Estimate(third, 0.0, (third + 1e-16, third + 1e-16), 9, 1 / 3, "").contains_chance
    assert not Estimate(0.4, 0.0, (0.35, 0.45), 9, 1 / 3, "").contains_chance
