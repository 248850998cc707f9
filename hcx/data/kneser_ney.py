"""The count-based baseline: an interpolated trigram with modified Kneser-Ney smoothing.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), with the counts at the
start of a document as in Heafield et al. 2013 (KenLM). It is trained on the very shards that a model is trained on and
scored on the same held-out documents over the same bytes: what a network does not beat, it has not learnt.

Each document is `eos w1 w2 ... eos`. The first token has one token of context (end-of-text), the later ones two.
    p3(c | a, b) = max(n(abc) - D3, 0) / n(ab.) + gamma3(ab) * p2(c | b)
    p2(c | b)    = max(m(bc)  - D2, 0) / m(b.)  + gamma2(b)  * p1(c)
    p1(c)        = max(k(c)   - D1, 0) / k(.)   + gamma1     / V
n counts occurrences; m(bc) counts the distinct a before bc, but occurrences where b opens a document (nothing can stand
before it); k(c) counts the distinct b before c. The discount D of each order depends on whether the count is 1, 2 or
3 and more, and gamma gives the discounted mass to the lower order.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from hcx.data.shards import Shard, ShardSet
from hcx.data.validation import validation_bytes, validation_documents
from hcx.errors import DataError

MAX_VOCAB = 1 << 21
"""Three ids must fit into 63 bits."""

Int = NDArray[np.int64]
Float = NDArray[np.float64]


FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""KenLM's, for samples too small for the estimate."""


def modified_discounts(counts: Int) -> Float:
    """`[4]`: what to subtract from counts of 0, 1, 2, and 3 or more (Chen and Goodman, equation 26).

    A small sample may lack some counts of counts, or yield a discount of 0, which would leave unseen tokens no
    probability; then all three are `FALLBACK_DISCOUNTS`.
    """
    n = [float(np.count_nonzero(counts == value)) for value in range(5)]
    if min(n[1:4]) > 0:
        y = n[1] / (n[1] + 2 * n[2])
        discounts = [value - (value + 1) * y * n[value + 1] / n[value] for value in (1, 2, 3)]
        if min(discounts) > 0:
            return np.array([0.0, *discounts])
    return np.array([0.0, *FALLBACK_DISCOUNTS])


class _Order:
    """Discounted counts of one order: n-grams as integers `context * V + token`."""

    def __init__(self, ngrams: Int, counts: Int, vocab_size: int) -> None:
        discounts = modified_discounts(counts)[np.minimum(counts, 3)]
        self._ngrams = ngrams
        self._left = counts - discounts
        contexts = ngrams // vocab_size
        first = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
        self._contexts = contexts[first]
        self._totals = np.add.reduceat(counts, first).astype(np.float64)
        self._masses = np.add.reduceat(discounts, first)

    def probability(self, contexts: Int, tokens: Int, lower: Float, vocab_size: int) -> Float:
        """Interpolates with the lower order; a context never seen leaves the lower order as it is."""
        place, seen = _find(self._contexts, contexts)
        totals, masses = self._totals[place], self._masses[place]
        where, known = _find(self._ngrams, contexts * vocab_size + tokens)
        left = np.where(known, self._left[where], 0.0)
        return np.where(seen, (left + masses * lower) / totals, lower)


def _find(table: Int, keys: Int) -> tuple[Int, NDArray[np.bool_]]:
    """Where each key stands in a sorted table, and whether it does."""
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return place, table[place] == keys


class KneserNeyTrigram:
    """A trigram model of documents.

    Args:
        documents: tokens of each document, end-of-text last.
        vocab_size: number of ids; each gets some probability.
        eos_id: the end-of-text token, which only ends documents.

    Raises:
        DataError: no tokens, or too large a vocabulary.
    """

    def __init__(self, documents: Iterable[Int], vocab_size: int, eos_id: int) -> None:
        if vocab_size > MAX_VOCAB:
            raise DataError(f"vocabulary of {vocab_size}: the trigram baseline takes at most {MAX_VOCAB}")
        stream = [np.array([eos_id], dtype=np.int64), *documents]
        tokens = np.concatenate(stream)
        if len(tokens) < 2:
            raise DataError("the trigram baseline needs at least one training token")
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        before, after = tokens[:-1], tokens[1:]
        # Trigrams within documents: the middle token is not the end of one.
        inside = before[1:] != eos_id
        trigrams = (tokens[:-2] * vocab_size + tokens[1:-1])[inside] * vocab_size + tokens[2:][inside]
        trigrams, trigram_counts = np.unique(trigrams, return_counts=True)
        # Bigrams: distinct tokens before them; occurrences where they open a document.
        opening = before == eos_id
        first, first_counts = np.unique(before[opening] * vocab_size + after[opening], return_counts=True)
        later, later_counts = np.unique(trigrams % vocab_size**2, return_counts=True)
        bigrams = np.concatenate([first, later])  # disjoint: only the first kind begins with end-of-text
        order = np.argsort(bigrams)
        bigrams, bigram_counts = bigrams[order], np.concatenate([first_counts, later_counts])[order]
        continuation = np.bincount(bigrams % vocab_size, minlength=vocab_size)
        self._trigrams = _Order(trigrams, trigram_counts, vocab_size) if len(trigrams) else None
        self._bigrams = _Order(bigrams, bigram_counts, vocab_size)
        discounts = modified_discounts(continuation[continuation > 0])[np.minimum(continuation, 3)]
        self._unigram: Float = (continuation - discounts + discounts.sum() / vocab_size) / continuation.sum()

    def probabilities(self, document: Int) -> Float:
        """The probability of each token of a document (`[tokens]`, end-of-text last) given those before it."""
        if document.size and (document.min() < 0 or document.max() >= self.vocab_size):
            raise DataError(f"token ids must lie in 0 to {self.vocab_size - 1}")
        before = np.concatenate([[self.eos_id], document[:-1]])
        result = self._bigrams.probability(before, document, self._unigram[document], self.vocab_size)
        if self._trigrams is not None and len(document) > 1:
            contexts = before[:-1] * self.vocab_size + before[1:]
            result[1:] = self._trigrams.probability(contexts, document[1:], result[1:], self.vocab_size)
        return result

    def bits(self, documents: Iterable[Int]) -> float:
        """-log2 of the probability of all documents."""
        return sum(-float(np.log2(self.probabilities(document)).sum()) for document in documents)


def kneser_ney_baseline(shards: ShardSet, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Bits per byte of held-out documents under trigrams of the training shards.

    Args:
        shards: training and held-out documents.
        limit: only the first so many held-out documents of each language, as for `validation_batches`.

    Returns:
        language -> `own` (a trigram of that language's training text) and `joint` (one of all training text, which
        is what a model that reads all languages compares with).
    """
    training = {language: shards.shard(language, "train") for language in shards.languages}
    joint = KneserNeyTrigram(
        (tokens for shard in training.values() for tokens in _documents(shard)), shards.vocab_size, shards.eos_id
    )
    result = {}
    for language, shard in training.items():
        own = KneserNeyTrigram(_documents(shard), shards.vocab_size, shards.eos_id)
        num_bytes = validation_bytes(shards, language, limit)
        held_out = list(validation_documents(shards, language, limit))
        result[language] = {"own": own.bits(held_out) / num_bytes, "joint": joint.bits(held_out) / num_bytes}
    return result


def _documents(shard: Shard) -> list[Int]:
    # One piece suffices: documents follow each other, each with its end-of-text.
    return [np.asarray(shard.tokens, dtype=np.int64)]
