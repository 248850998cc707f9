"""Embeddings whose frequent rows have more planes than rare ones.

I. Chung et al., Extremely Low Bit Transformer Quantization for On-Device Neural Machine Translation, Findings of EMNLP
2020, section 3.1 and algorithm 1: words sorted by frequency fall into `b` clusters whose sizes grow by a factor `r`;
cluster `i` gets `b - i` bits. Frequencies are those of the mix that is served, each language normalised before it is
weighed, so that one language's volume does not push another's words to one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator
from torch import Tensor

from hcx.config import Config
from hcx.data import ShardSet
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight
from hcx.kernels.segmented import SegmentedWeight, split_rows

_TOKENS = 1 << 22
"""Counted at a time: memory."""


def cluster_sizes(vocab_size: int, clusters: int, ratio: int) -> list[int]:
    """Rows of each cluster, the most frequent first: `v r^i / sum_k r^k`, rounded down; the last takes what is left.

    Raises:
        ConfigError: a number is out of range, or there are too few rows for a first cluster.
    """
    if clusters < 1 or ratio < 1 or vocab_size < 1:
        raise ConfigError(f"vocab_size = {vocab_size}, clusters = {clusters}, ratio = {ratio}; must be positive")
    total = sum(ratio**k for k in range(clusters))
    sizes = [vocab_size * ratio**i // total for i in range(clusters - 1)]
    if 0 in sizes:
        raise ConfigError(f"{vocab_size} rows are too few for {clusters} clusters that grow by {ratio}")
    return [*sizes, vocab_size - sum(sizes)]


def average_bits(clusters: int, ratio: int) -> Fraction:
    """Mean planes per weight, `sum (b - i) r^i / sum r^i`; scales not counted."""
    return Fraction(sum((clusters - i) * ratio**i for i in range(clusters)), sum(ratio**i for i in range(clusters)))


def mixed_frequencies(counts: Mapping[str, NDArray[np.int64]], shares: Mapping[str, float] | None = None) -> Tensor:
    """Share of each token in a mix of languages, fp64 `[vocab]`; every token is counted once more than it was seen.

    Args:
        counts: language -> how often each token occurred.
        shares: language -> weight in the mix; equal if None.

    Raises:
        ConfigError: a language has no counts, or nothing has a positive weight.
    """
    weights = dict.fromkeys(counts, 1.0) if shares is None else dict(shares)
    for language, weight in weights.items():
        if language not in counts:
            raise ConfigError(f"shares.{language}: no such language; there are {', '.join(sorted(counts))}")
        if weight < 0:
            raise ConfigError(f"shares.{language} = {weight}; must not be negative")
    if not sum(weights.values()) > 0:
        raise ConfigError("shares: nothing has a positive weight")
    parts = [
        weight * torch.from_numpy((counts[language] + 1) / (counts[language].sum() + len(counts[language])))
        for language, weight in weights.items()
    ]
    return torch.stack(parts).sum(0) / sum(weights.values())


def frequency_order(frequencies: Tensor, pinned: Iterable[int] = ()) -> Tensor:
    """Rows from the most to the least frequent, int32; pinned rows come first, and of equal ones the smaller id."""
    scores = frequencies.double().clone()
    scores[list(pinned)] = torch.inf
    return scores.argsort(descending=True, stable=True).int()


def token_counts(shards: ShardSet, language: str, vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs in the training text of a language; held-out text is not looked at.

    Raises:
        ConfigError: the shards have tokens that the vocabulary lacks.
    """
    tokens = shards.shard(language, "train").tokens
    total = np.zeros(vocab_size, np.int64)
    for begin in range(0, len(tokens), _TOKENS):
        found = np.bincount(tokens[begin : begin + _TOKENS].astype(np.int64), minlength=vocab_size)
        if len(found) > vocab_size:
            raise ConfigError(f"{language}: the shards hold token {len(found) - 1}; the weight has {vocab_size} rows")
        total += found
    return total


def _positive(value: int) -> int:
    if value < 1:
        raise ValueError("must be at least 1")
    return value


class Clusters(Config):
    """Rows of an embedding in clusters by frequency."""

    shards: str
    """Token shards whose training text is counted."""
    ratio: Annotated[int, AfterValidator(_positive)] = 2
    """How much larger each cluster is than the one before: 1, 2, 4, 8 make 2.5, 1.73, 1.32, 1.14 bits of 4."""
    shares: dict[str, float] | None = None
    """Language -> weight in the mix that is served; equal if absent."""
    pinned: tuple[int, ...] = ()
    """Token ids that get the most planes whatever their frequency, such as special tokens and single bytes."""

    def order(self, vocab_size: int) -> Tensor:
        """Rows from the most to the least frequent.

        Raises:
            HcxError: the shards are not there or have another vocabulary, or a pinned id is out of range.
        """
        if any(not 0 <= token < vocab_size for token in self.pinned):
            raise ConfigError(f"clusters.pinned: ids from 0 to {vocab_size - 1} are allowed")
        shards = ShardSet.open(Path(self.shards))
        counts = {language: token_counts(shards, language, vocab_size) for language in shards.languages}
        return frequency_order(mixed_frequencies(counts, self.shares), self.pinned)

    def compress(self, weight: Tensor, bits: int, quantize: Callable[[Tensor, int], PackedWeight]) -> SegmentedWeight:
        """As many clusters as `bits`, each quantized on its own with its number of planes."""
        return quantize_clustered(weight, self.order(weight.shape[0]), bits, self.ratio, quantize)


def quantize_clustered(
    weight: Tensor, order: Tensor, bits: int, ratio: int, quantize: Callable[[Tensor, int], PackedWeight]
) -> SegmentedWeight:
    """Codes the rows of a weight in clusters of falling bit width.

    Args:
        weight: `[vocab, hidden]`.
        order: int32, rows from the most to the least frequent.
        bits: of the first cluster, and how many clusters there are.
        ratio: of the sizes of neighbouring clusters.
        quantize: (rows, bits) -> codes.
    """
    sizes = cluster_sizes(weight.shape[0], bits, ratio)
    runs = split_rows(weight, order, sizes)
    return SegmentedWeight(tuple(quantize(run, bits - i) for i, run in enumerate(runs)), order)
