"""Regularisation rules do exactly what they say, and events fall where the schedule says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hcx.compress.regularise import EventSchedule, RegulariseConfig, check_plan, matrix_shapes
from hcx.compress.regularise.config import BCQRule, LowRankRule, PruneRule, UniformRule
from hcx.compress.regularise.rules import (
    add_noise,
    decay,
    global_threshold,
    low_rank,
    pack,
    prune,
    prune_below,
    to_grid,
    truncate_rank,
)
from hcx.config.decode import decode
from hcx.dist import derived_generator
from hcx.errors import ConfigError
from hcx.optim import Schedule, lr_factor
from hcx.testing.tiny import tiny_config


def matrix(rows: int = 24, columns: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=derived_generator("regularise test", seed)) * 0.05 + 0.003


def test_pruning_zeroes_the_exact_number_of_smallest_weights_and_is_idempotent() -> None:
    weight = matrix()
    weight[0, :7] = 0.01
    weight[1, :7] = -0.01
    for count in (0, 1, 400, weight.numel() - 1):
        pruned = prune(weight, count)
        assert int((pruned == 0).sum()) == count
        kept = pruned != 0
        assert torch.equal(pruned[kept], weight[kept])
        if count:
            assert weight[~kept].abs().max() <= weight[kept].abs().min()
        assert torch.equal(prune(pruned, count), pruned)


def test_equal_magnitudes_at_the_threshold_fall_by_index() -> None:
    weight = torch.tensor([[1.0, -2.0, 2.0], [2.0, -2.0, 3.0]])
    assert torch.equal(prune(weight, 3), torch.tensor([[0.0, 0.0, 0.0], [2.0, -2.0, 3.0]]))


@pytest.mark.parametrize("count", [1, 17, 700, 1500, 2000])
def test_a_threshold_over_several_weights_is_that_of_a_sort(count: int) -> None:
    weights = [matrix(seed=seed) for seed in range(3)]
    weights[1][3, :30] = weights[0][2, 5]  # ties across weights
    threshold, ties = global_threshold(lambda fn: [fn(weight) for weight in weights] and None, count)  # type: ignore[arg-type, func-returns-value]
    assert float(threshold) == float(torch.cat([w.flatten() for w in weights]).abs().sort().values[count - 1])
    zeroed = 0
    for weight in weights:
        pruned, ties = prune_below(weight, threshold, ties)
        zeroed += int((pruned == 0).sum())
    assert (zeroed, ties) == (count, 0)


def test_the_pruned_share_rises_along_a_cubic_and_ends_where_it_should() -> None:
    rule = PruneRule(fraction=0.8, initial_fraction=0.2, ramp_steps=10)
    shares = [rule.fraction_at(step, last=False) for step in range(12)]
    assert shares[0] == pytest.approx(0.2)
    assert shares[5] == pytest.approx(0.8 - 0.6 / 8)
    assert shares[10] == shares[11] == 0.8
    assert all(a <= b for a, b in itertools.pairwise(shares))
    assert rule.fraction_at(0, last=True) == 0.8


@pytest.mark.parametrize("tile", [(24, 40), (8, 16), (10, 7)])
def test_low_rank_is_the_best_of_its_rank_in_every_tile_and_idempotent(tile: tuple[int, int]) -> None:
    weight = matrix()
    found = truncate_rank(weight, 3, tile)
    for row, column in itertools.product(range(0, 24, tile[0]), range(0, 40, tile[1])):
        part = (slice(row, row + tile[0]), slice(column, column + tile[1]))
        values = torch.linalg.svdvals(found[part].double())
        assert (values[3:] < 1e-6 * values[0]).all()
        # Eckart & Young: the error of the best one is the norm of what is cut off.
        rest = torch.linalg.svdvals(weight[part].double())[3:]
        error = torch.linalg.norm((found[part] - weight[part]).double())
        assert float(error) == pytest.approx(float(rest.norm()), rel=1e-5, abs=1e-9)
    again = truncate_rank(found, 3, tile)
    assert float((again - found).norm() / found.norm()) < 1e-5


def test_the_rank_falls_along_its_ramp() -> None:
    rule = LowRankRule(rank=2, ramp_steps=8)
    ranks = [
        int((torch.linalg.svdvals(low_rank(rule, matrix(), step, last=False).double()) > 1e-7).sum())
        for step in (0, 2, 4, 8)
    ]
    assert ranks[0] == 24
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 2


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, 16, 64])
def test_rounding_to_a_grid_is_idempotent_bit_for_bit_and_near(bits: int, group_size: int) -> None:
    weight = matrix(17, 41)
    weight[3] = 0.0
    weight[4] = -0.0123
    packed = to_grid(weight, bits, group_size)
    once = packed.dequantize()
    assert torch.equal(to_grid(once, bits, group_size).dequantize(), once)
    assert once[3].eq(0).all()
    # A step is 2 half; half of it, and the rounding of step and middle to a few bits, bound every error.
    half = packed.scales[-1].double().repeat_interleave(packed.group_size, 1)[:, :41]
    error = (once.double() - weight.double()).abs()
    varied = [row for row in range(17) if row not in (3, 4)]
    assert (error[varied] <= half[varied] * (1 + (2**bits) * 2.0**-8 + 1 / 16)).all()


@pytest.mark.parametrize("rule", [BCQRule(bits=2, group_size=16), BCQRule(bits=3, group_size=64, offset=True)])
def test_binary_codes_take_few_values_and_are_the_sum_of_their_planes_bit_for_bit(rule: BCQRule) -> None:
    packed = pack(rule, matrix(), last=True)
    weight = packed.dequantize()
    for group in weight.split(min(rule.group_size, 40), dim=1):
        assert all(len(row.unique()) <= 2**rule.bits for row in group)
    # Summed by hand, coarsest plane first.
    expected = torch.zeros(24, 40)
    groups = torch.arange(40) // packed.group_size
    for plane in range(rule.bits):
        signs = packed.signs()[plane]
        expected = (
            torch.addcmul(expected, signs, packed.scales[plane].float()[:, groups])
            if plane
            else (signs * packed.scales[0].float()[:, groups])
        )
    if packed.offset is not None:
        expected = expected + packed.offset[:, groups]
    assert torch.equal(weight, expected)


def test_weight_decay_events_are_powers_bit_for_bit() -> None:
    weight = matrix()
    found, expected = weight, weight.clone()
    for _ in range(5):
        found = decay(found, 0.02, 0.3)
        expected = expected.mul(1.0 - 0.02 * 0.3)
    assert torch.equal(found, expected)


def test_noise_has_the_stated_range_mean_and_variance_and_follows_its_seed() -> None:
    weight = torch.zeros(400, 500)
    noise = add_noise(weight, 0.2, 7, 64, "a")
    assert noise.abs().max() <= 0.2
    deviation = 0.2 / 3**0.5
    assert abs(float(noise.mean())) < 5 * deviation / 200_000**0.5
    assert float(noise.var()) == pytest.approx(deviation**2, rel=0.02)
    assert torch.equal(noise, add_noise(weight, 0.2, 7, 64, "a"))
    for other in ((8, 64, "a"), (7, 65, "a"), (7, 64, "b")):
        assert not torch.equal(noise, add_noise(weight, 0.2, *other))


def schedule(steps: int, config: RegulariseConfig, shape: Schedule | None = None) -> EventSchedule:
    shape = shape or Schedule(kind="constant")
    return EventSchedule(config, steps, lambda step: lr_factor(shape, step, steps), shape.warmup_steps)


def test_events_fall_on_multiples_of_the_period_and_on_the_last_step() -> None:
    assert schedule(20, RegulariseConfig(period=6)).steps() == [6, 12, 18, 20]
    assert schedule(4, RegulariseConfig(period=1)).steps() == [1, 2, 3, 4]
    assert schedule(20, RegulariseConfig(period=6), Schedule(warmup_steps=7)).steps() == [12, 18, 20]
    assert schedule(20, RegulariseConfig(period=6, warmup_steps=12)).steps() == [18, 20]
    assert schedule(20, RegulariseConfig(method="straight_through", period=1)).steps() == [20]
    assert schedule(20, RegulariseConfig(period=6)).since_last(12) == 6
    assert schedule(20, RegulariseConfig(period=6)).since_last(20) == 2


def test_scaled_periods_lengthen_as_the_learning_rate_falls() -> None:
    config = RegulariseConfig(period="lr_scaled", base_period=10)
    assert schedule(50, config).steps() == [10, 20, 30, 40, 50]
    falling = schedule(400, config, Schedule(kind="cosine")).steps()
    gaps = [b - a for a, b in itertools.pairwise([0, *falling[:-1]])]
    assert gaps[0] == 11  # the first steps are a little below the peak
    assert all(a <= b + 1 for a, b in itertools.pairwise(gaps))
    assert gaps[-1] > 3 * gaps[0]
    # As much learning rate passes between any two events, but for the rounding to whole steps.
    passed = [
        sum(lr_factor(Schedule(kind="cosine"), step, 400) for step in range(a, b))
        for a, b in itertools.pairwise([0, *falling[:-1]])
    ]
    assert all(abs(value - 10) < 1 for value in passed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"period": 0}, "period = 0"),
        ({"period": "sometimes"}, "period"),
        ({"default": {"kind": "prune", "fraction": 1.0}}, "fraction = 1"),
        ({"default": {"kind": "bcq", "bits": 9}}, "allowed: 1 to 8"),
        ({"default": {"kind": "svd"}}, "svd"),
        ({"exceptions": [{"pattern": "*"}]}, "keep: true or a rule"),
        ({"default": {"kind": "low_rank", "rank": 8, "initial_rank": 4}}, "initial_rank = 4"),
    ],
)
def test_a_section_that_means_nothing_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode(RegulariseConfig, values, "here")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "tied", "message"),
    [
        ({"output": {"kind": "bcq"}}, True, "set regularise.embedding instead"),
        ({"exceptions": [{"pattern": "*.downproj", "keep": True}]}, False, "names no linear layer"),
        ({"exceptions": [{"pattern": "*", "keep": True}]}, False, "every weight is left alone"),
        ({"default": {"kind": "low_rank", "rank": 40}}, False, "stores more numbers than the tile"),
        ({"method": "straight_through", "default": {"kind": "prune"}}, False, "use method: period"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_says_why(values: dict, tied: bool, message: str) -> None:
    config = decode(RegulariseConfig, values, "here")
    problems = check_plan(config, matrix_shapes(tiny_config(tie_embeddings=tied)), tied)
    assert any(message in problem for problem in problems), problems


def test_a_rule_covers_what_it_says_and_a_tied_embedding_once() -> None:
    shapes = matrix_shapes(tiny_config(tie_embeddings=True))
    assert "lm_head" not in shapes
    config = decode(
        RegulariseConfig,
        {
            "default": {"kind": "bcq"},
            "embedding": {"kind": "uniform", "bits": 8},
            "exceptions": [{"pattern": "*.o_proj", "keep": True}, {"pattern": "*.mlp.*", "rule": {"kind": "prune"}}],
        },
        "here",
    )
    rules = config.rules(list(shapes))
    assert isinstance(rules["model.embed_tokens"], UniformRule)
    assert isinstance(rules["model.layers.1.mlp.up_proj"], PruneRule)
    assert isinstance(rules["model.layers.0.self_attn.q_proj"], BCQRule)
    assert not any(stem.endswith("o_proj") or "norm" in stem for stem in rules)
