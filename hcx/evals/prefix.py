"""Shared prefixes are computed once: the exemplars of a task, and the context of the continuations of one question.

Rows that share their context form a family. A few families are computed together: what they all begin with is read once
into the cache and copied, the rest of each context is read in one padded pass, and then the continuations, one of every
family at a time, are read over the same places: a query sees no place after its own, so what an earlier continuation
left there does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcx.generate.cache import ContiguousKVCache
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta

Tokens = tuple[int, ...]

SLACK = 8
"""Tokens before the scored part in which rows of one family may differ: tokenisers merge across the border."""

BLOCK = 64
"""Families that are sorted by length together: less padding, and neighbours still share their exemplars."""

LEAST_SAVED = 0.2
"""Share of the tokens that must not be computed for the cache to be worth its copies."""

LEAST_ROOT = 16
"""A shorter common beginning is not worth a pass of its own."""


@dataclass(frozen=True)
class Family:
    """Rows with one context.

    Attributes:
        prefix: tokens that all rows share and of which none is scored.
        rows: the inputs.
    """

    prefix: int
    rows: tuple[Tokens, ...]


def shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle)
    return low


def families(first_scored: Mapping[Tokens, int]) -> list[Family]:
    """Groups rows by context, in lexicographic order.

    Args:
        first_scored: inputs -> place of the first hidden state that predicts a scored token.
    """
    found: list[Family] = []
    current: list[Tokens] = []
    prefix = 0
    for row in sorted(first_scored):
        # The place that predicts the first scored token is itself computed with the continuation.
        limit = first_scored[row]
        together = min(prefix, limit, shared(current[0], row)) if current else 0
        if current and together >= max(1, limit - SLACK) and together >= prefix - SLACK:
            current.append(row)
            prefix = together
            continue
        if current:
            found.append(Family(prefix, tuple(current)))
        current, prefix = [row], limit
    if current:
        found.append(Family(prefix, tuple(current)))
    return found


def batches(found: Sequence[Family], size: int) -> Iterator[list[Family]]:
    """Families to be computed together: of like length, those with most rows first."""
    for start in range(0, len(found), BLOCK):
        block = sorted(found[start : start + BLOCK], key=lambda family: (-family.prefix, family.rows))
        for begin in range(0, len(block), size):
            yield sorted(block[begin : begin + size], key=lambda family: (-len(family.rows), family.rows))


def common_beginning(group: Sequence[Family]) -> int:
    """Tokens that all contexts of a group begin with."""
    head = group[0].rows[0]
    return min(min(family.prefix, shared(head, family.rows[0])) for family in group)


def saved_share(found: Sequence[Family], size: int) -> float:
    """Share of the tokens that a plan does not compute, exemplars counted once for each batch at worst."""
    plain = sum(len(row) for family in found for row in family.rows)
    computed = 0
    for group in batches(found, size):
        root = common_beginning(group) if len(group) > 1 else 0
        computed += root + sum(f.prefix - root + sum(len(r) - f.prefix for r in f.rows) for f in group)
    return 1 - computed / plain if plain else 0.0


class PrefixScorer:
    """Final hidden states of rows' last tokens, with their common beginnings computed once.

    Args:
        decoder: the model, all stages.
        config: its shape.
        size: families computed together.
        left: shorter rows are filled up on the left, else on the right.
    """

    def __init__(self, decoder: Decoder, config: ModelConfig, size: int, left: bool = False) -> None:
        self._decoder, self._config, self._size, self._left = decoder, config, size, left
        weight = decoder.output_weight()
        self._dtype, self._device = weight.dtype, weight.device
        self._root: Tokens = ()

    @torch.inference_mode()
    def run(self, found: Sequence[Family]) -> Iterator[tuple[list[Tokens], list[int], Tensor]]:
        """Yields (rows, how many tokens of each are not in the states, hidden states `[seq, rows, hidden]`)."""
        longest = max(len(row) for family in found for row in family.rows)
        cache = ContiguousKVCache(self._config, self._size + 1, longest, self._dtype, self._device)
        for group in batches(found, self._size):
            root = self._share(cache, group)
            self._read_contexts(cache, group, root)
            for number in range(len(group[0].rows)):
                going = [family for family in group if len(family.rows) > number]
                rows = [family.rows[number] for family in going]
                tails = [row[family.prefix :] for row, family in zip(rows, going, strict=True)]
                starts = [family.prefix for family in going]
                yield rows, starts, self._forward(cache, 0, tails, starts)

    def _share(self, cache: ContiguousKVCache, group: Sequence[Family]) -> int:
        """Reads what all contexts begin with into every row; its length."""
        length = common_beginning(group)
        if length < LEAST_ROOT or len(group) == 1:
            return 0
        wanted = group[0].rows[0][:length]
        known = shared(self._root, wanted)
        if known < 0.9 * length:
            self._forward(cache, self._size, [wanted], [0])
            self._root, known = wanted, length
        for row in range(len(group)):
            cache.move(self._size, row, known)
        return known

    def _read_contexts(self, cache: ContiguousKVCache, group: Sequence[Family], root: int) -> None:
        rests = [family.rows[0][root : family.prefix] for family in group]
        if any(rests):
            self._forward(cache, 0, rests, [root] * len(group))

    def _forward(self, cache: ContiguousKVCache, first: int, parts: Sequence[Tokens], starts: Sequence[int]) -> Tensor:
        width = max(map(len, parts))
        tokens = torch.zeros((len(parts), width), dtype=torch.long)
        positions = torch.full((len(parts), width), cache.scratch, dtype=torch.long)
        for row, (part, start) in enumerate(zip(parts, starts, strict=True)):
            begin = width - len(part) if self._left else 0
            tokens[row, begin : begin + len(part)] = torch.tensor(part, dtype=torch.long)
            positions[row, begin : begin + len(part)] = torch.arange(start, start + len(part))
        end = max(start + len(part) for part, start in zip(parts, starts, strict=True))
        view = cache.view(first, len(parts), end)
        meta = ForwardMeta(positions.to(self._device), kv_cache=view)
        hidden: Tensor = self._decoder(tokens.to(self._device), meta)
        return hidden
