"""Pruning: which weights are kept, and binary codes for those alone.

A weight's importance is its magnitude, or its magnitude times the root mean square of what it multiplies (Sun et al.,
Wanda, ICLR 2024, section 3), or the loss that removing it costs when the others of its row make up for it (Frantar and
Alistarh, SparseGPT, ICML 2023, section 3.3; Hassibi and Stork, Optimal Brain Surgeon, 1993). The last one also moves
the weights that stay.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from hcx.compress.bcq import check_arguments
from hcx.errors import ConfigError
from hcx.kernels.format import PackedWeight, pack_signs
from hcx.kernels.masked import MaskedWeight

Scope = Literal["matrix", "row", "group"]
SCOPES: tuple[Scope, ...] = ("matrix", "row", "group")
DAMPING = 0.01
"""Of the mean of the Gram matrix's diagonal, added to it (SparseGPT's default): inputs that are sums of others."""
_COLUMNS = 128
"""Columns between two choices of what is pruned (SparseGPT, section 3.2: blocks of 128)."""
_RIDGE = 1e-6
_GROUPS = 1 << 13
"""Coded at a time: memory."""


def importance(weight: Tensor, moments: Tensor | None = None) -> Tensor:
    """`|w|`, or `|w| sqrt(E x^2)` with second moments `[in]` of the layer's inputs.

    Raises:
        ConfigError: moments do not fit, are negative or are not finite.
    """
    if moments is None:
        return weight.abs().float()
    if tuple(moments.shape) != (weight.shape[1],) or not bool((moments >= 0).all() and moments.isfinite().all()):
        raise ConfigError(
            f"second moments {tuple(moments.shape)} of a layer with {weight.shape[1]} inputs; expected one finite, "
            "non-negative number per input"
        )
    return weight.abs().float() * moments.float().sqrt()


def keep_mask(scores: Tensor, sparsity: float, scope: Scope = "matrix", group_size: int = 128) -> Tensor:
    """True for the weights that stay: all but the `floor(sparsity * n)` least important of each scope.

    Of equal scores the later ones are pruned, so the count is exact and the same everywhere.

    Args:
        scores: importance `[out, in]`, finite.
        sparsity: share to prune, at least 0 and below 1.
        scope: whether weights compete within the matrix, a row, or a group of a row.
        group_size: inputs per group; the last group may be short.

    Raises:
        ConfigError: an argument is out of range.
    """
    _check_sparsity(sparsity)
    if scope not in SCOPES:
        raise ConfigError(f"scope = {scope!r}; allowed: {', '.join(SCOPES)}")
    if not bool(scores.isfinite().all()):
        raise ConfigError("the importance of some weights is not finite (NaN or infinite weights?)")
    if scope == "matrix":
        return _keep_most(scores.reshape(1, -1), sparsity).view_as(scores)
    if scope == "row":
        return _keep_most(scores, sparsity)
    parts = [_keep_most(part, sparsity) for part in scores.split(group_size, dim=1)]
    return torch.cat(parts, dim=1)


def _keep_most(scores: Tensor, sparsity: float) -> Tensor:
    pruned = math.floor(sparsity * scores.shape[1] + 1e-9)  # 0.7 * 10 is 6.999... in binary
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = torch.ones_like(scores, dtype=torch.bool)
    return kept.scatter_(1, order[:, scores.shape[1] - pruned :], False)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity = {sparsity}; allowed: at least 0 and below 1 (0.7 prunes 70 % of the weights)")


def prune_with_gram(weight: Tensor, gram: Tensor, sparsity: float, scope: Scope = "row") -> tuple[Tensor, Tensor]:
    """One-shot pruning in which the weights that stay make up for those that go (SparseGPT, algorithm 1).

    Columns are visited in order. In each block of 128 the weights with the smallest `w^2 / [H^-1]_cc` go, with `[H^-1]`
    of the columns not yet visited; what each one contributed is moved to later columns of its row.

    Args:
        weight: `[out, in]`, finite.
        gram: `[in, in]`, mean of `x x^T` over the layer's inputs.
        sparsity: share to prune.
        scope: `row` or `matrix`: whether weights of a block compete within a row or over all rows.

    Returns:
        The changed weight, zero where it is pruned, and the bool mask of what stays.

    Raises:
        ConfigError: an argument is out of range, or the Gram matrix is not one.
    """
    _check_sparsity(sparsity)
    if scope not in ("row", "matrix"):
        raise ConfigError(f"scope = {scope!r}; with a Gram matrix: row or matrix")
    columns = weight.shape[1]
    if tuple(gram.shape) != (columns, columns) or not bool(gram.isfinite().all()):
        raise ConfigError(f"Gram matrix {tuple(gram.shape)} of a layer with {columns} inputs; expected a finite square")
    if not bool(weight.isfinite().all()):
        raise ConfigError("some weights are not finite")
    hessian = gram.double().clone()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean() + torch.finfo(torch.float32).tiny)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        # Row c of the upper factor is the inverse for columns c and later, once the earlier ones are settled.
        factor = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:
        raise ConfigError("the Gram matrix is not positive definite: no mean of outer products of inputs") from None
    rest, kept = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    for begin in range(0, columns, _COLUMNS):
        here = slice(begin, min(begin + _COLUMNS, columns))
        scores = (rest[:, here] / factor.diagonal()[here]).square().float()
        kept[:, here] = keep_mask(scores, sparsity, scope)
        errors = torch.zeros_like(rest[:, here])
        for column in range(here.start, here.stop):
            gone = rest[:, column] * ~kept[:, column] / factor[column, column]
            rest[:, column : here.stop] -= gone[:, None] * factor[column, column : here.stop]
            errors[:, column - begin] = gone
        rest[:, here.stop :] -= errors @ factor[here, here.stop :]
    return (rest * kept).to(weight.dtype), kept


def quantize_kept(
    weight: Tensor,
    kept: Tensor,
    bits: int,
    group_size: int,
    rounds: int = 15,
    scale_dtype: torch.dtype = torch.float16,
) -> MaskedWeight:
    """Binary codes by alternation, fitted to the kept weights of each group alone.

    Greedy planes, then least-squares scales and nearest codes in turns (see `bcq`), every sum over kept weights only;
    the best of all rounds is stored, group by group. Groups with nothing kept get scales of zero.

    Args:
        weight: `[out, in]`, finite.
        kept: bool `[out, in]`.
        bits: planes, 1 to 7: serving takes one more.
        group_size: inputs per scale; the last group may be short.
        rounds: of alternation.
        scale_dtype: of the stored scales.

    Raises:
        ConfigError: an argument is out of range.
    """
    check_arguments(weight, bits, group_size, scale_dtype)
    if bits > 7:
        raise ConfigError(f"bits = {bits} of a pruned weight; 1 to 7 are allowed (serving takes one plane more)")
    if kept.dtype != torch.bool or kept.shape != weight.shape:
        raise ConfigError(f"mask is {kept.dtype} {tuple(kept.shape)}; expected bool {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    group_size = min(group_size, in_features)
    count = -(-in_features // group_size)
    pad = count * group_size - in_features
    groups = torch.nn.functional.pad(weight.float() * kept, (0, pad)).view(-1, group_size)
    counts = torch.nn.functional.pad(kept, (0, pad)).view(-1, group_size).float()
    parts = []
    for some, own in zip(groups.split(_GROUPS), counts.split(_GROUPS), strict=True):
        parts.append(_alternate(some, own, *_greedy(some, own, bits, scale_dtype), rounds, scale_dtype))
    scales, positive = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    planes = positive.view(out_features, count, bits, group_size).permute(2, 0, 1, 3).flatten(2)[:, :, :in_features]
    stored = scales.view(out_features, count, bits).permute(2, 0, 1).to(scale_dtype)
    packed = PackedWeight(pack_signs(planes), stored.contiguous(), None, in_features, group_size)
    return MaskedWeight.of(packed, kept)


def _greedy(groups: Tensor, counts: Tensor, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales `[n, q]` and bool codes `[n, q, g]`."""
    rest, scales, positive = groups.clone(), [], []
    number = counts.sum(1).clamp_min(1)
    for _ in range(bits):
        signs = rest >= 0
        scale = ((rest.abs() * counts).sum(1) / number).to(scale_dtype).float()
        rest = rest - torch.where(signs, scale[:, None], -scale[:, None])
        scales.append(scale)
        positive.append(signs)
    return torch.stack(scales, 1), torch.stack(positive, 1)


def _alternate(
    groups: Tensor, counts: Tensor, scales: Tensor, positive: Tensor, rounds: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    bits = scales.shape[1]
    patterns = (torch.arange(1 << bits)[:, None] >> torch.arange(bits) & 1).float() * 2 - 1
    best, least = (scales, positive), _error(groups, counts, scales, positive)
    for _ in range(rounds):
        signs = positive.float() * 2 - 1
        weighted = signs * counts[:, None]
        normal = (weighted @ signs.transpose(1, 2)).double()
        # A group with no weight, or fewer than planes, has no single solution; a little ridge picks the smallest.
        normal.diagonal(dim1=1, dim2=2).add_(_RIDGE * counts.sum(1).clamp_min(1).double()[:, None])
        solved = torch.linalg.solve(normal, (weighted @ groups[:, :, None]).double())[:, :, 0]
        scales = solved.abs().sort(dim=1, descending=True).values.to(scale_dtype).float()
        levels, order = (scales @ patterns.T).sort(dim=1)
        middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        codes = order.gather(1, torch.searchsorted(middles, groups))
        following = (codes[:, None, :] >> torch.arange(bits)[None, :, None] & 1).bool()
        error = _error(groups, counts, scales, following)
        better = error < least
        least = torch.where(better, error, least)
        best = (
            torch.where(better[:, None], scales, best[0]),
            torch.where(better[:, None, None], following, best[1]),
        )
        if torch.equal(following, positive):
            break
        positive = following
    return best


def _error(groups: Tensor, counts: Tensor, scales: Tensor, positive: Tensor) -> Tensor:
    """Squared error of the kept weights of each group."""
    levels = (scales[:, :, None] * (positive.float() * 2 - 1)).sum(1)
    return ((groups - levels).square() * counts).sum(1)
