"""Log-probabilities of labels without keeping logits of the whole batch.

`log p(label) = z[label] - logsumexp(z)` with `z = scale * hidden @ weight^T`. The product is taken in chunks of tokens.
Small problems keep each chunk's logits for the backward pass; large ones recompute them, so memory stays bounded for a
vocabulary of 100,000 entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 << 20
"""Size of one chunk of fp32 logits."""
KEEP_BYTES = 256 << 20
"""Up to this size in total, logits are kept instead of computed twice."""


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the output matrix this rank holds, where the vocabulary is split over ranks.

    Attributes:
        first: vocabulary id of the first local row.
        combine: (log-normalisers, label logits) `[n]` over the local rows -> over all ranks' rows; collective. A label
            that lies elsewhere has the logit 0 here.
    """

    first: int
    combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def chunked_token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0, shard: VocabularyShard | None = None
) -> Tensor:
    """Log-probability of each label.

    Args:
        hidden: `[n, hidden]`.
        weight: `[vocab, hidden]`.
        labels: `[n]` int64.
        scale: factor of the logits.
        shard: where `weight` is a part of the matrix. The gradient of `hidden` is then this rank's part of a sum.

    Returns:
        `[n]` fp32, differentiable in `hidden` and `weight`.
    """
    result: Tensor = _TokenLogprobs.apply(hidden, weight, labels, scale, shard)
    return result


def _logits(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits.mul_(scale) if scale != 1.0 else logits


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, shard: VocabularyShard | None
    ) -> Tensor:
        held: Tensor | None = None
        if shard is not None:
            local = labels - shard.first
            held = (local >= 0) & (local < weight.shape[0])
            labels = local.masked_fill(~held, 0)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        keep = 4 * hidden.shape[0] * weight.shape[0] <= KEEP_BYTES and any(ctx.needs_input_grad[:2])
        kept, normalisers, picked = [], [], []
        for start in range(0, hidden.shape[0], rows):
            logits = _logits(hidden[start : start + rows], weight, scale)
            normalisers.append(torch.logsumexp(logits, dim=-1))
            picked.append(logits.gather(-1, labels[start : start + rows, None])[:, 0])
            if keep:
                kept.append(logits)
        normaliser, chosen = torch.cat(normalisers), torch.cat(picked)
        if shard is not None and held is not None:
            normaliser, chosen = shard.combine(normaliser, chosen.masked_fill(~held, 0.0))
        ctx.save_for_backward(hidden, weight, labels, held, normaliser, *kept)
        ctx.scale, ctx.rows = scale, rows
        return chosen - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, labels, held, normaliser, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for number, start in enumerate(range(0, hidden.shape[0], ctx.rows)):
            part = slice(start, start + ctx.rows)
            logits = kept[number].clone() if kept else _logits(hidden[part], weight, ctx.scale)
            # d log p / dz = one_hot(label) - softmax(z), times the incoming gradient and the scale.
            upstream = grad[part].float() * ctx.scale
            delta = logits.sub_(normaliser[part, None]).exp_().mul_(-upstream[:, None])
            at_label = upstream if held is None else upstream * held[part]
            delta.scatter_add_(-1, labels[part, None], at_label[:, None])
            delta = delta.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(delta, weight, out=grad_hidden[part])
            if ctx.needs_input_grad[1]:
                product = delta.t() @ hidden[part]
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
        return grad_hidden, grad_weight, None, None, None
