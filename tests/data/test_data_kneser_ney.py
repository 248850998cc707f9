"""The trigram baseline against a slow implementation written from the formulas alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcx.data.kneser_ney import KneserNeyTrigram, kneser_ney_baseline, modified_discounts
from hcx.data.validation import validation_bytes, validation_documents
from hcx.errors import DataError
from hcx.testing.shards import tiny_shards

EOS = 0


class BruteForce:
    """Dictionaries and sums, one n-gram at a time."""

    def __init__(self, documents: list[list[int]], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        trigrams: Counter[tuple[int, ...]] = Counter()
        openings: Counter[tuple[int, ...]] = Counter()
        for document in documents:
            padded = [EOS, *document]
            openings[EOS, document[0]] += 1
            trigrams.update(zip(padded, padded[1:], padded[2:], strict=False))
        before: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for a, b, c in trigrams:
            before[b, c].add(a)
        bigrams = Counter({bigram: len(words) for bigram, words in before.items()}) + openings
        unigrams: Counter[tuple[int, ...]] = Counter((c,) for _, c in bigrams)
        self.orders = [unigrams, bigrams, trigrams]
        self.discounts = [self.discount(counts) for counts in self.orders]

    @staticmethod
    def discount(counts: Counter[tuple[int, ...]]) -> list[float]:
        n = Counter(counts.values())
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            result = [1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
            if all(discount > 0 for discount in result):
                return [0.0, *result]
        return [0.0, 0.5, 1.0, 1.5]

    def probability(self, context: tuple[int, ...], token: int) -> float:
        order = len(context)
        lower = 1 / self.vocab_size if order == 0 else self.probability(context[1:], token)
        counts, discount = self.orders[order], self.discounts[order]
        following = [(ngram, count) for ngram, count in counts.items() if ngram[:-1] == context]
        total = sum(count for _, count in following)
        if total == 0:
            return lower
        mass = sum(discount[min(count, 3)] for _, count in following)
        count = counts[(*context, token)]
        return (count - discount[min(count, 3)]) / total + mass / total * lower


documents_of_tokens = st.lists(
    st.lists(st.integers(1, 5), max_size=12).map(lambda d: [*d, EOS]), min_size=1, max_size=8
)


def arrays(documents: list[list[int]]) -> list[np.ndarray]:
    return [np.array(document, dtype=np.int64) for document in documents]


@settings(max_examples=100, deadline=None)
@given(documents_of_tokens, documents_of_tokens)
def test_probabilities_equal_those_of_a_brute_force_implementation(training, held_out) -> None:
    model = KneserNeyTrigram(arrays(training), 7, EOS)
    slow = BruteForce(training, 7)
    for document in held_out:
        expected = [
            slow.probability((EOS,) if i == 0 else ([EOS, *document][i - 1], document[i - 1]), document[i])
            for i in range(len(document))
        ]
        np.testing.assert_allclose(model.probabilities(np.array(document)), expected, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(documents_of_tokens)
def test_probabilities_sum_to_one_after_every_context(training) -> None:
    model = KneserNeyTrigram(arrays(training), 7, EOS)
    for context in [(), *itertools.product(range(1, 7)), *itertools.product(range(1, 7), repeat=2)]:
        total = sum(model.probabilities(np.array([*context, token]))[-1] for token in range(7))
        assert math.isclose(total, 1.0, rel_tol=1e-12), context
        assert min(model.probabilities(np.array([*context, token]))[-1] for token in range(7)) > 0


def test_discounts_follow_the_formula() -> None:
    counts = np.array([1] * 10 + [2] * 4 + [3] * 2 + [4])
    y = 10 / 18
    np.testing.assert_allclose(modified_discounts(counts), [0, 1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.5])
    np.testing.assert_array_equal(modified_discounts(np.array([1, 1, 2])), [0, 0.5, 1.0, 1.5])


def test_text_like_the_training_text_costs_fewer_bits_than_other_text() -> None:
    generator = np.random.default_rng(0)
    pattern = [np.array([*([1, 2, 3] * 5), EOS]) for _ in range(20)]
    model = KneserNeyTrigram(pattern, 8, EOS)
    assert model.bits(pattern[:1]) < 0.2 * model.bits([np.append(generator.integers(1, 7, 15), EOS)])


def test_the_baseline_divides_by_the_bytes_of_the_held_out_documents(tmp_path) -> None:
    shards = tiny_shards(tmp_path)
    result = kneser_ney_baseline(shards)
    assert set(result) == {"ko", "en", "code"}
    shard = shards.shard("ko", "train")
    own = KneserNeyTrigram(
        [np.asarray(shard.document(n), dtype=np.int64) for n in range(shard.num_documents)], shards.vocab_size, EOS
    )
    expected = own.bits(validation_documents(shards, "ko")) / validation_bytes(shards, "ko")
    assert result["ko"]["own"] == pytest.approx(expected, rel=1e-12)
    limited = kneser_ney_baseline(shards, limit=1)["ko"]["own"]
    assert limited == pytest.approx(own.bits(validation_documents(shards, "ko", 1)) / validation_bytes(shards, "ko", 1))


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="0 to 3"):
        KneserNeyTrigram([np.array([1, EOS])], 4, EOS).probabilities(np.array([4]))
