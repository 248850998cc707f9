"""Sampling against closed forms."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from hcx.errors import ConfigError
from hcx.generate import SamplingParams, sample
from hcx.generate.sampling import SamplerState

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))
DRAWS = 4000
# Four standard deviations of a proportion of 0.5 over DRAWS draws.
SPREAD = 4 * math.sqrt(0.25 / DRAWS)


def _shares(**params) -> dict[int, float]:
    state = SamplerState(SamplingParams(seed=11, **params), prompt=[])
    tokens = [int(sample(LOGITS[None], [state])) for _ in range(DRAWS)]
    return {token: count / DRAWS for token, count in Counter(tokens).items()}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, {0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}),
        ({"temperature": 1.0, "top_k": 2}, {0: 2 / 3, 1: 1 / 3}),
        ({"temperature": 1.0, "top_p": 0.8}, {0: 0.5 / 0.9, 1: 0.25 / 0.9, 2: 0.15 / 0.9}),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, {0: 1.0}),
        ({"temperature": 0.5}, {0: 0.25 / 0.345, 1: 0.0625 / 0.345, 2: 0.0225 / 0.345, 3: 0.01 / 0.345}),
        ({"temperature": 1e-9}, {0: 1.0}),
        ({"temperature": 1e-300}, {0: 1.0}),
        ({"temperature": 1.0, "top_k": 10**30}, {0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}),
        ({"temperature": 0.0}, {0: 1.0}),
    ],
)
def test_tokens_come_with_the_probabilities_that_the_parameters_define(
    params: dict[str, float], expected: dict[int, float]
) -> None:
    shares = _shares(**params)
    assert shares.keys() == expected.keys()
    for token, share in expected.items():
        assert shares[token] == pytest.approx(share, abs=SPREAD)


@pytest.mark.parametrize("params", [{"top_p": 0.9}, {"top_k": 700}, {"top_k": 40}, {"top_p": 0.999, "top_k": 900}])
def test_a_flat_distribution_over_a_large_vocabulary_is_drawn_from_as_a_full_sort_says(params: dict) -> None:
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * 0.1
    states = [SamplerState(SamplingParams(temperature=1.0, seed=seed, **params), []) for seed in range(3)]
    draws = torch.stack([sample(logits, states) for _ in range(300)])
    for row in range(3):
        order = logits[row].argsort(descending=True)
        probabilities = logits[row, order][: params.get("top_k", 2000)].double().softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        allowed = order[: int((before < params.get("top_p", 1.0)).sum())]
        assert torch.isin(draws[:, row], allowed).all()
        # Among equals, draws reach far down the order: the tail is not cut off.
        ranks = torch.stack([(order == token).nonzero()[0, 0] for token in draws[:, row]])
        assert ranks.max() > 0.9 * len(allowed)


def test_rows_of_one_batch_keep_their_own_parameters() -> None:
    states = [
        SamplerState(SamplingParams(), [2]),
        SamplerState(SamplingParams(temperature=1.0, top_k=1, seed=1), [2]),
        SamplerState(SamplingParams(repetition_penalty=100.0), [0]),
    ]
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    before = logits.clone()
    assert sample(logits, states).tolist() == [2, 2, 1]
    assert torch.equal(logits, before)


def test_repetition_penalty_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    prompt = [4, 4, 9, int(logits.argmax())]
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), logits.clone())
    state = SamplerState(SamplingParams(repetition_penalty=1.7), prompt)
    assert int(sample(logits, [state])) == int(expected.argmax())


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    state = SamplerState(SamplingParams(presence_penalty=0.5, frequency_penalty=1.0), prompt=[0, 0, 0])
    logits = torch.tensor([[3.0, 0.0]])
    assert int(sample(logits, [state])) == 0
    state.record(0)
    assert int(sample(logits, [state])) == 0  # 3 - 0.5 - 1
    state.record(0)
    assert int(sample(logits, [state])) == 0  # 3 - 0.5 - 2
    state.record(0)
    assert int(sample(logits, [state])) == 1  # 3 - 0.5 - 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0; must be from 0 to 100"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0"),
        ({"top_p": 1.5}, "top_p = 1.5; must be from 0 to 1"),
        ({"max_tokens": -1}, "max_tokens = -1; must be at least 0"),
        ({"stop": ("",)}, "non-empty"),
        ({"stop": "ab"}, "sequence"),
    ],
)
def test_wrong_parameters_are_refused_by_name(params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**params)
