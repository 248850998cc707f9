"""Token-budget batches: the properties of the specification's acceptance item 12."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcx.data.chat_samples import ChatSamples
from hcx.data.token_budget import TokenBudgetLoader, held_out_batches
from hcx.errors import ConfigError, DataError


def samples_of(lengths: list[int], seed: int = 0) -> ChatSamples:
    """Samples with so many inputs each; every id tells which sample it is from."""
    generator = np.random.Generator(np.random.PCG64(seed))
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32) + 1, np.asarray(lengths) + 1)
    starts = np.concatenate([[0], np.cumsum(np.asarray(lengths) + 1)]).astype(np.int64)
    trained = generator.random(len(ids)) < 0.5
    trained[starts[:-1]] = False
    return ChatSamples(ids, trained, starts, ("a",) * len(lengths), fill_id=0)


def spread_lengths(count: int, seed: int = 1, longest: int = 256) -> list[int]:
    """Lengths as conversations have them: most short, some long."""
    generator = random.Random(seed)
    return [min(longest, max(2, int(generator.lognormvariate(3.6, 0.9)))) for _ in range(count)]


layouts = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=120),
    st.sampled_from([1, 2, 4]),
    st.integers(48, 160),
    st.integers(1, 60),
    st.sampled_from([1, 8]),
    st.integers(0, 5),
)


@settings(max_examples=150, deadline=None)
@given(layouts)
def test_no_micro_batch_exceeds_the_budget_and_every_sample_comes_once_in_an_epoch(
    layout: tuple[list[int], int, int, int, int, int],
) -> None:
    lengths, micro_batches, budget, window, multiple, seed = layout
    samples = samples_of(lengths)
    loader = TokenBudgetLoader(samples, micro_batches * budget, budget, seed, window, multiple)
    step = 0
    for epoch in range(2):
        seen: Counter[int] = Counter()
        filled = computed = trained = 0
        for number in range(len(loader.epoch_plan(epoch))):
            assert loader.epoch_of(step) == (epoch, number)
            batches = loader.step_batch(step)
            assert len(batches) == micro_batches
            assert len({batch.tokens.shape for batch in batches}) == 1
            for batch in batches:
                assert batch.tokens.numel() <= budget
                assert batch.tokens.shape[1] % multiple == 0
                seen.update(batch.sample_ids)
                filled += int((batch.tokens == 0).sum())
                computed += batch.tokens.numel()
                trained += float(batch.weights.sum())
                for row, sample in enumerate(batch.sample_ids):
                    assert int((batch.tokens[row] == sample + 1).sum()) == lengths[sample]
            step += 1
        assert seen == Counter(range(len(lengths)))
        assert trained == samples.num_trained
        assert loader.epoch_padding(epoch) == pytest.approx(filled / computed)
        assert loader.samples_before(step) == (epoch + 1) * len(lengths)


@pytest.mark.parametrize("seed", range(3))
def test_filling_is_far_below_that_of_random_batches(seed: int) -> None:
    budget = 1024
    lengths = spread_lengths(3000, seed)
    loader = TokenBudgetLoader(samples_of(lengths), 4 * budget, budget, seed, window=1000)
    order = lengths.copy()
    random.Random(seed).shuffle(order)
    computed, rows, longest = 0, 0, 0
    for length in order:
        # A random micro-batch takes samples as they come while it stays within the budget.
        if (rows + 1) * max(longest, length) > budget:
            computed, rows, longest = computed + rows * longest, 0, 0
        rows, longest = rows + 1, max(longest, length)
    at_random = 1 - sum(lengths) / (computed + rows * longest)
    assert loader.epoch_padding() < 0.15
    assert at_random > 0.4
    assert loader.epoch_padding() < at_random / 3


@pytest.mark.parametrize("dp_size", [2, 4])
def test_replicas_share_out_what_one_process_does(dp_size: int) -> None:
    samples = samples_of(spread_lengths(200))
    loader = TokenBudgetLoader(samples, 4 * 512, 512, seed=3)
    for step in range(12):
        whole = loader.step_batch(step)
        shared = [batch for rank in range(dp_size) for batch in loader.step_batch(step, rank, dp_size)]
        assert len(whole) == len(shared)
        for one, other in zip(whole, shared, strict=True):
            assert one.sample_ids == other.sample_ids
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.weights, other.weights)


def test_the_order_is_a_function_of_seed_and_step() -> None:
    samples = samples_of(spread_lengths(300))

    def ids(seed: int, start: int, stop: int, threads: int = 0) -> list[tuple[int, ...]]:
        loader = TokenBudgetLoader(samples, 1024, 512, seed)
        return [b.sample_ids for step in loader.batches(start, stop, 1024, 512, threads=threads) for b in step]

    straight = ids(1, 0, 40)
    assert ids(1, 0, 40, threads=3) == straight
    assert ids(1, 0, 13) + ids(1, 13, 40) == straight
    assert ids(2, 0, 40) != straight
    loader = TokenBudgetLoader(samples, 1024, 512, 1)
    first = [plan.samples.tolist() for plan in loader.epoch_plan(0)]
    second = [plan.samples.tolist() for plan in loader.epoch_plan(1)]
    assert first != second
    # Epochs mix: the longest sample does not always stand with the same others.
    together = [next(set(step) for step in epoch if 0 in step) for epoch in (first, second)]
    assert together[0] != together[1]


def test_a_loader_goes_on_only_with_the_same_order() -> None:
    samples = samples_of(spread_lengths(50))
    loader = TokenBudgetLoader(samples, 1024, 512, 1)
    list(loader.batches(0, 3, 1024, 512))
    state = loader.state_dict()
    assert state["next_sample"] == loader.samples_before(3)
    other = TokenBudgetLoader(samples, 1024, 512, 1)
    other.load_state_dict(state)
    assert other.next_sample == state["next_sample"]
    for changed, named in (
        (TokenBudgetLoader(samples, 1024, 512, 2), "seed was 1"),
        (TokenBudgetLoader(samples, 1024, 512, 1, window=7), "window was"),
        (TokenBudgetLoader(samples_of(spread_lengths(50), seed=9), 1024, 512, 1), "samples was"),
    ):
        with pytest.raises(DataError, match=named):
            changed.load_state_dict(state)


def test_sizes_that_cannot_be_are_refused() -> None:
    samples = samples_of([100, 3])
    with pytest.raises(ConfigError, match="cannot hold the longest conversation, which fills 104"):
        TokenBudgetLoader(samples, 200, 100)
    with pytest.raises(ConfigError, match="not a multiple"):
        TokenBudgetLoader(samples, 300, 200)
    loader = TokenBudgetLoader(samples, 400, 200)
    with pytest.raises(ConfigError, match="4 data-parallel ranks"):
        next(loader.batches(0, 1, 400, 200, 0, 4))


def test_held_out_samples_are_scored_once_under_the_budget() -> None:
    samples = samples_of(spread_lengths(90))
    batches = list(held_out_batches(samples, 512))
    assert sorted(sample for batch in batches for sample in batch.sample_ids) == list(range(90))
    assert all(batch.tokens.numel() <= 512 for batch in batches)
    assert sum(float(batch.weights.sum()) for batch in batches) == samples.num_trained
