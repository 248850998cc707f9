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
CACHED_CHUNK_BYTES = 8 << 20
"""The same on a CPU where products are kept: it stays in the cache between the passes over it."""
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


class _Logits:
    """Computes one chunk after the other in the same memory: fresh pages for each chunk cost more than its arithmetic.

    Shapes: `hidden` `[rows, hidden]`, `weight` `[vocab, hidden]`, the result fp32 `[rows, vocab]`, overwritten by the
    next call.
    """

    def __init__(self, rows: int, weight: Tensor, scale: float) -> None:
        self.weight, self.scale = weight, scale
        self._wide = torch.empty(rows, weight.shape[0], dtype=torch.float32, device=weight.device)
        same = weight.dtype == torch.float32
        self._narrow = self._wide if same else torch.empty_like(self._wide, dtype=weight.dtype)

    def product(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """The unscaled logits in the weight's precision: what is kept for the backward pass."""
        return torch.mm(hidden, self.weight.t(), out=self._narrow[: hidden.shape[0]] if out is None else out)

    def narrow(self, wide: Tensor) -> Tensor:
        narrow = self._narrow[: wide.shape[0]]
        return narrow if narrow.data_ptr() == wide.data_ptr() else narrow.copy_(wide)

    def widen(self, product: Tensor) -> Tensor:
        wide = self._wide[: product.shape[0]]
        if wide.data_ptr() != product.data_ptr():
            wide.copy_(product)
        return wide.mul_(self.scale) if self.scale != 1.0 else wide


def _logsumexp_(logits: Tensor) -> Tensor:
    """`torch.logsumexp` over the last dimension, leaving `softmax(logits)` in its input. `[rows, vocab]` -> `[rows]`.

    The largest probability is exp(largest logit - normaliser). One fused pass: on a CPU a third of the time of
    maximum, difference, exponential and sum.
    """
    top = logits.amax(dim=-1)
    torch.softmax(logits, dim=-1, out=logits)
    return top.sub_(logits.amax(dim=-1).log_())


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
        count, vocab = hidden.shape[0], weight.shape[0]
        keep = count * vocab * weight.element_size() <= KEEP_BYTES and any(ctx.needs_input_grad[:2])
        chunk_bytes = CACHED_CHUNK_BYTES if keep and hidden.device.type == "cpu" else CHUNK_BYTES
        rows = max(1, min(count, chunk_bytes // (4 * vocab)))
        kept = weight.new_empty(count, vocab) if keep else None
        chunk = _Logits(rows, weight, scale)
        normaliser, chosen = (torch.empty(count, dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            logits = chunk.widen(chunk.product(hidden[part], None if kept is None else kept[part]))
            chosen[part] = logits.gather(-1, labels[part, None])[:, 0]
            normaliser[part] = _logsumexp_(logits)
        share = None  # of the local rows in the probability of all rows
        if shard is not None and held is not None:
            local = normaliser.clone()
            normaliser, chosen = shard.combine(normaliser, chosen.masked_fill(~held, 0.0))
            share = (local - normaliser).exp_()
        ctx.save_for_backward(hidden, weight, labels, held, share, kept)
        ctx.scale, ctx.rows = scale, rows
        return chosen - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, labels, held, share, kept = ctx.saved_tensors
        grad_hidden, grad_weight = None, None
        if kept is None and ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden)
        chunk = _Logits(ctx.rows, weight, ctx.scale)
        for start in range(0, hidden.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = chunk.widen(chunk.product(hidden[part]) if kept is None else kept[part])
            # d log p / dz = one_hot(label) - softmax(z), times the incoming gradient and the scale.
            upstream = grad[part].float() * ctx.scale
            over_all = upstream if share is None else upstream * share[part]
            delta = torch.softmax(logits, dim=-1, out=logits).mul_(-over_all[:, None])
            at_label = upstream if held is None else upstream * held[part]
            delta.scatter_add_(-1, labels[part, None], at_label[:, None])
            if kept is not None:
                # In place: a second backward pass over the same graph is refused by autograd's version check.
                kept[part] = delta
                continue
            delta = chunk.narrow(delta)
            if grad_hidden is not None:
                torch.mm(delta, weight, out=grad_hidden[part])
            if ctx.needs_input_grad[1]:
                product = delta.t() @ hidden[part]
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
        if kept is not None:
            # One product over all tokens: sums of chunks would be rounded to the weight's precision in between.
            grad_hidden = kept @ weight if ctx.needs_input_grad[0] else None
            grad_weight = kept.t() @ hidden if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, None, None, None
