"""How far a compressed model's predictions lie from full precision, token by token and language by language."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from hcx.data.batch import MicroBatch
from hcx.errors import DataError
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta

UNNAMED = "all"
"""The language of rows that state none."""


@dataclass(frozen=True)
class Divergence:
    """Divergence over a set of positions.

    Attributes:
        kl: mean Kullback-Leibler divergence KL(full || compressed) in nats per token.
        kl_stderr: its standard error; rows are taken as independent (tokens of a row are not). NaN below two rows.
        top1: share of positions where both models' most likely token is the same.
        top1_stderr: its standard error.
        tokens: positions.
    """

    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    tokens: int


@dataclass
class _Rows:
    """Sums over the counted positions of each row."""

    kl: list[float] = field(default_factory=list)
    agreed: list[float] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)

    def divergence(self) -> Divergence:
        kl, kl_stderr = _ratio(self.kl, self.counted)
        top1, top1_stderr = _ratio(self.agreed, self.counted)
        return Divergence(kl, kl_stderr, top1, top1_stderr, round(sum(self.counted)))

    def extend(self, other: _Rows) -> None:
        self.kl += other.kl
        self.agreed += other.agreed
        self.counted += other.counted


def divergence(full: Decoder, compressed: Decoder, micro_batches: Iterable[MicroBatch]) -> Divergence:
    """Compares two models on the positions that have a weight, whatever their language.

    Args:
        full, compressed: decoders with one vocabulary.
        micro_batches: what both read.

    Raises:
        DataError: no position has a weight, or the vocabularies differ.
    """
    whole = _Rows()
    for rows in _compare(full, compressed, micro_batches).values():
        whole.extend(rows)
    if not whole.counted:
        raise DataError("no position of these batches has a weight; there is nothing to compare on")
    return whole.divergence()


def divergence_by_language(
    full: Decoder, compressed: Decoder, micro_batches: Iterable[MicroBatch]
) -> dict[str, Divergence]:
    """Compares two models for each language apart: `MicroBatch.sources` names the language of each row.

    Args:
        full, compressed: decoders with one vocabulary.
        micro_batches: what both read.

    Raises:
        DataError: no position has a weight, or the vocabularies differ.
    """
    found = _compare(full, compressed, micro_batches)
    if not found:
        raise DataError("no position of these batches has a weight; there is nothing to compare on")
    return {language: rows.divergence() for language, rows in sorted(found.items())}


@torch.no_grad()
def _compare(full: Decoder, compressed: Decoder, micro_batches: Iterable[MicroBatch]) -> dict[str, _Rows]:
    if full.config.vocab_size != compressed.config.vocab_size:
        raise DataError(
            f"the models have {full.config.vocab_size} and {compressed.config.vocab_size} tokens; "
            "a divergence needs one vocabulary"
        )
    found: dict[str, _Rows] = defaultdict(_Rows)
    for batch in micro_batches:
        meta = ForwardMeta(positions=batch.positions, document_ids=batch.document_ids)
        hidden, other = full(batch.tokens, meta), compressed(batch.tokens, meta)
        for row in range(batch.tokens.shape[0]):
            # One row at a time: logits of a large vocabulary are never held for a whole batch.
            counted = batch.weights[row] > 0
            if not counted.any():
                continue
            one = full.output(hidden[:, row : row + 1]).logits()[0, counted].log_softmax(-1)
            two = compressed.output(other[:, row : row + 1]).logits()[0, counted].log_softmax(-1)
            rows = found[batch.sources[row] if batch.sources else UNNAMED]
            rows.kl.append(float((one.exp() * (one - two)).sum(dtype=torch.float64)))
            rows.agreed.append(float((one.argmax(-1) == two.argmax(-1)).sum()))
            rows.counted.append(float(counted.sum()))
    return dict(found)


def _ratio(values: list[float], sizes: list[float]) -> tuple[float, float]:
    """`sum(values) / sum(sizes)` and the standard error of that ratio over clusters (linearisation)."""
    total = sum(sizes)
    ratio = sum(values) / total
    count = len(values)
    if count < 2:
        return ratio, math.nan
    spread = sum((value - ratio * size) ** 2 for value, size in zip(values, sizes, strict=True))
    return ratio, math.sqrt(count / (count - 1) * spread) / total
