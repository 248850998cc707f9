"""How far a compressed model's predictions lie from full precision, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hcx.data.batch import MicroBatch
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta


@dataclass(frozen=True)
class Divergence:
    """Divergence over a set of positions.

    Attributes:
        kl: mean Kullback-Leibler divergence KL(full || compressed) in nats per token.
        kl_stderr: its standard error, rows taken as independent (tokens of a row are not).
        top1: share of positions where both models' most likely token is the same.
        top1_stderr: its standard error.
        tokens: positions.
    """

    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    tokens: int


@torch.no_grad()
def divergence(full: Decoder, compressed: Decoder, micro_batches: Iterable[MicroBatch]) -> Divergence:
    """Compares two models on the positions that have a weight.

    Args:
        full, compressed: decoders with one vocabulary.
        micro_batches: what both read.
    """
    kls: list[float] = []
    agreements: list[float] = []
    counts: list[float] = []
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
            kls.append(float((one.exp() * (one - two)).sum(dtype=torch.float64)))
            agreements.append(float((one.argmax(-1) == two.argmax(-1)).sum()))
            counts.append(float(counted.sum()))
    kl, kl_stderr = _ratio(kls, counts)
    top1, top1_stderr = _ratio(agreements, counts)
    return Divergence(kl, kl_stderr, top1, top1_stderr, round(sum(counts)))


def _ratio(values: list[float], sizes: list[float]) -> tuple[float, float]:
    """`sum(values) / sum(sizes)` and the standard error of that ratio over clusters (linearisation)."""
    total = sum(sizes)
    ratio = sum(values) / total
    count = len(values)
    if count < 2:
        return ratio, math.nan
    spread = sum((value - ratio * size) ** 2 for value, size in zip(values, sizes, strict=True))
    return ratio, math.sqrt(count / (count - 1) * spread) / total
