"""Allocation under a budget, sensitivities, and the arithmetic of the mixed-precision paper."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from hcx.compress import quantize
from hcx.compress.accounting import Component, base_transformer, mean_bits, shares, times_smaller
from hcx.compress.allocate import Choice, allocate
from hcx.compress.sensitivity import groups_of, measure_sensitivity
from hcx.errors import ConfigError, DataError
from hcx.model.decoder import Decoder
from hcx.testing.tiny import decoder_tensors, tiny_config, tiny_decoder


def random_items(seed: int, count: int, convex: bool) -> dict[str, list[Choice]]:
    generator = random.Random(seed)
    items = {}
    for index in range(count):
        size = generator.choice([1, 1, 2, 3]) if not convex else 1
        losses = [generator.random() * 4**-bits for bits in range(1, 5)]
        if convex:  # each bit saves less than the one before it
            gains = sorted((generator.random() for _ in range(3)), reverse=True)
            losses = [sum(gains[bits:]) for bits in range(4)]
        items[f"m{index}"] = [Choice(bits, bits * size * 100, losses[bits - 1]) for bits in range(1, 5)]
    return items


def greedy(items: dict[str, list[Choice]], budget: int) -> float:
    """The specification's greedy: remove a bit where (rise of the loss) / (bits saved) is smallest, until it fits."""
    at = {name: len(choices) - 1 for name, choices in items.items()}
    while sum(items[name][i].cost for name, i in at.items()) > budget:
        steps = {
            name: (items[name][i - 1].loss - items[name][i].loss) / (items[name][i].cost - items[name][i - 1].cost)
            for name, i in at.items()
            if i
        }
        at[min(steps, key=lambda name: steps[name])] -= 1
    return sum(items[name][i].loss for name, i in at.items())


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_within_the_budget_has_a_smaller_loss(seed: int) -> None:
    items = random_items(seed, 6, convex=False)
    full = sum(choices[-1].cost for choices in items.values())
    for budget in (full // 4, full // 2 + 7, full):
        found = allocate(items, budget)
        least = min(
            (sum(c.loss for c in chosen), sum(c.cost for c in chosen))
            for chosen in itertools.product(*items.values())
            if sum(c.cost for c in chosen) <= budget
        )
        assert found.loss == pytest.approx(least[0], abs=1e-12)
        assert found.cost <= budget
        assert found.loss <= greedy(items, budget) + 1e-12
        assert list(found.choices) == list(items)


@pytest.mark.parametrize("seed", range(6))
def test_on_convex_losses_of_equal_sizes_greedy_is_as_good(seed: int) -> None:
    items = random_items(seed, 20, convex=True)
    for budget in (2500, 4000, 6300):
        assert allocate(items, budget).loss == pytest.approx(greedy(items, budget), abs=1e-9)


def test_hundreds_of_matrices_of_a_real_model_are_allocated_exactly() -> None:
    # The sizes of SmolLM2-135M: 30 blocks, 7 matrices each. The relaxation gives a bound from below.
    generator = random.Random(0)
    sizes = {"q": 576 * 576, "k": 192 * 576, "v": 192 * 576, "o": 576 * 576, "gate": 1536 * 576, "up": 1536 * 576}
    sizes["down"] = 576 * 1536
    items = {
        f"{layer}.{kind}": [Choice(b, b * size, generator.random() * 4.0**-b) for b in range(1, 7)]
        for layer in range(30)
        for kind, size in sizes.items()
    }
    budget = int(2.5 * sum(30 * size for size in sizes.values()))
    found = allocate(items, budget)
    assert found.cost <= budget
    bound = max(
        sum(min(c.loss + price * c.cost for c in choices) for choices in items.values()) - price * budget
        for price in [10.0**-k * m for k in range(6, 12) for m in (1, 2, 3, 5, 7)]
    )
    assert bound <= found.loss <= greedy(items, budget)


def test_impossible_budgets_and_unusable_numbers_are_refused() -> None:
    items = {"a": [Choice(1, 100, 1.0), Choice(2, 200, 0.5)]}
    with pytest.raises(ConfigError, match="a budget of 99 is not met by the cheapest choices, which take 100"):
        allocate(items, 99)
    with pytest.raises(ConfigError, match="a: no choices"):
        allocate({"a": []}, 10)
    with pytest.raises(ConfigError, match="not usable"):
        allocate({"a": [Choice(1, 100, float("nan"))]}, 1000)
    with pytest.raises(ConfigError, match="nothing to allocate"):
        allocate({}, 1)


def test_the_paper_s_sizes_come_out() -> None:
    # Chung et al. 2020: shares of the weights, average bits of (2.5, 1.8, 3.7) and (2.5, 1.8, FP), 11.8 times smaller.
    mixed = base_transformer(Fraction(5, 2), (2, 3, 1), (3, 4))
    assert {k: f"{float(100 * v):.1f}" for k, v in shares(mixed).items()} == {
        "embedding": "27.6",
        "decoder": "41.4",
        "encoder": "31.0",
    }
    assert sum(part.weights for part in mixed) == 60_817_408
    assert f"{float(mean_bits(mixed)):.3f}" == "2.552"
    assert f"{float(mean_bits(mixed, 32)):.3f}" == "2.711"
    assert f"{float(times_smaller(mixed)):.2f}" == "11.80"
    true_rows = base_transformer(Fraction(5, 2), (2, 3, 1), (3, 4), true_rows=True)
    assert f"{float(mean_bits(true_rows, 32)):.3f}" == "2.687"
    assert f"{float(times_smaller(true_rows)):.2f}" == "11.91"
    kept = [
        Component("biases", 12 * (2048 + 512), Fraction(32)),
        Component("norms", (2 * 6 + 3 * 6 + 2) * 2 * 512, Fraction(32)),
    ]
    assert f"{float(times_smaller(true_rows + kept)):.2f}" == "11.78"
    full_encoder = base_transformer(Fraction(5, 2), (2, 3, 1), None)
    assert f"{float(mean_bits(full_encoder)):.2f}" == "11.34"
    decoder = [part for part in mixed if part.name.startswith("decoder")]
    encoder = [part for part in mixed if part.name.startswith("encoder")]
    assert mean_bits(decoder) == Fraction(7, 4)
    assert mean_bits(encoder) == Fraction(11, 3)


def test_groups_name_what_a_plan_can_match() -> None:
    stems = [
        f"model.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert groups_of(stems, "layer")["model.layers.1.mlp.*"] == stems[4:]
    assert groups_of(stems, "type")["*.up_proj"] == [stems[1], stems[4]]
    assert len(groups_of(stems, "matrix")) == 6
    with pytest.raises(ConfigError, match="allowed: layer, type, matrix"):
        groups_of(stems, "block")


def test_a_reading_replaces_one_group_and_puts_the_weights_back() -> None:
    decoder = tiny_decoder(tiny_config())
    before = decoder_tensors(decoder)
    stems = [name.removesuffix(".weight") for name in before if name.endswith("_proj.weight")]
    seen: list[set[str]] = []

    def loss(model: Decoder) -> dict[str, float]:
        now = decoder_tensors(model)
        changed = {name.removesuffix(".weight") for name in now if not torch.equal(now[name], before[name])}
        seen.append(changed)
        return {
            "ko": float(sum((now[f"{s}.weight"] - before[f"{s}.weight"]).square().sum() for s in changed)),
            "en": 1.0,
        }

    def codes(stem: str, weight: Tensor, bits: int) -> Tensor:
        return quantize(weight, bits, 32, "greedy").dequantize()

    groups = groups_of(stems, "type")
    whole, rises = measure_sensitivity(decoder, groups, [1, 3], codes, loss)
    assert whole == {"ko": 0.0, "en": 1.0}
    assert seen == [set()] + [set(stems) for stems in groups.values() for _ in range(2)]
    for by_bits in rises.values():
        assert by_bits[1]["ko"] > by_bits[3]["ko"] > 0
        assert by_bits[1]["en"] == 0
    after = decoder_tensors(decoder)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ConfigError, match=r"the model has no model\.layers\.9"):
        measure_sensitivity(decoder, {"x": ["model.layers.9"]}, [1], codes, loss)
    with pytest.raises(DataError, match="at full precision"):
        measure_sensitivity(decoder, groups, [1], codes, lambda model: {"ko": float("nan")})
    with pytest.raises(RuntimeError, match="interrupted"):

        def interrupted(stem: str, weight: Tensor, bits: int) -> Tensor:
            raise RuntimeError("interrupted")

        measure_sensitivity(decoder, groups, [1], interrupted, loss)
    assert all(torch.equal(decoder_tensors(decoder)[name], before[name]) for name in before)
