"""Counts the pieces that merges are learnt in: pattern pieces, cut further at morpheme boundaries."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from hcx.tokenizer.alphabet import to_alphabet
from hcx.tokenizer.morphemes import HANGUL, Analyser, Granularity, cuts

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

DELIMITER = "\ue000"
"""Marks a morpheme boundary inside a pattern piece. Pieces are written in the byte alphabet, which lacks it, so text
that holds this very character cannot be mistaken for a boundary."""

_HUNDRED = 100

_BATCH_CHARACTERS = 1_000_000
"""Text that is analysed at once: enough for the analyser's threads, and little memory."""

_REMEMBERED_LINES = 200_000
"""Lines whose boundaries are remembered: templates and headings repeat."""


def count_pieces(
    texts: Iterable[str],
    pattern: PreTokenizer,
    analyser: Analyser | None = None,
    granularity: Granularity = "coarse",
) -> Counter[str]:
    """How often each piece occurs, in the byte alphabet, with `DELIMITER` at morpheme boundaries.

    Args:
        texts: read once.
        pattern: cuts a text into pieces; merges never cross them.
        analyser: finds morphemes; None: no boundaries.
        granularity: which of them are boundaries.
    """
    raw: Counter[tuple[str, ...]] = Counter()
    known: dict[str, list[int]] = {}
    for batch in _batches(texts):
        if analyser is not None:
            if len(known) > _REMEMBERED_LINES:
                known.clear()
            new = dict.fromkeys(
                line
                for text in batch
                for line in text.split("\n")
                if line not in known and HANGUL.search(line) is not None
            )
            for line, morphemes in zip(new, analyser.morphemes(list(new)), strict=True):
                known[line] = cuts(line, morphemes, granularity)
        for text in batch:
            raw.update(_pieces(text, pattern, _boundaries(text, known)))
    mapped: Counter[str] = Counter()
    for parts, count in raw.items():
        mapped[DELIMITER.join(map(to_alphabet, parts))] += count
    return mapped


def soften(counts: Mapping[str, int], crossing: float) -> Counter[str]:
    """Lets merges cross boundaries when they are frequent enough.

    Each piece is counted twice, with its boundaries and without, in the ratio of `1 - crossing` to `crossing`. So an
    occurrence of a pair across a boundary counts `crossing`, and one inside counts 1.

    Args:
        counts: of pieces with `DELIMITER`.
        crossing: 0 to 1, to a hundredth.

    Returns:
        Counts in hundredths.
    """
    without = round(_HUNDRED * crossing)
    softened: Counter[str] = Counter()
    for piece, count in counts.items():
        whole = piece.replace(DELIMITER, "")
        if whole == piece:
            softened[piece] += _HUNDRED * count
            continue
        if without < _HUNDRED:
            softened[piece] += (_HUNDRED - without) * count
        if without:
            softened[whole] += without * count
    return softened


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _boundaries(text: str, known: Mapping[str, list[int]]) -> list[int]:
    if not known:
        return []
    found: list[int] = []
    start = 0
    for line in text.split("\n"):
        found += [start + place for place in known.get(line, ())]
        start += len(line) + 1
    return found


def _pieces(text: str, pattern: PreTokenizer, boundaries: list[int]) -> Iterator[tuple[str, ...]]:
    for piece, (start, end) in pattern.pre_tokenize_str(text):
        inner = boundaries[bisect_right(boundaries, start) : bisect_left(boundaries, end)]
        if inner:
            edges = (0, *(place - start for place in inner), len(piece))
            yield tuple(piece[a:b] for a, b in itertools.pairwise(edges))
        else:
            yield (piece,)
