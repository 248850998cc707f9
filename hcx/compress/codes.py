"""Codes of groups of weights, and the two half-steps that every binary coder alternates between.

A weight's codes over all planes are one number here, its *pattern*: bit `i` is set where plane `i` is +1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcx.kernels import PackedWeight
from hcx.kernels.format import pack_signs

RIDGE = 1e-7
"""Keeps the normal equations solvable where two planes coincide, relative to the group size."""


@dataclass
class Codes:
    """Codes of `n` groups of `g` weights.

    Attributes:
        patterns: int64 or uint8 `[n, g]`.
        scales: fp32 `[n, q]`.
        offsets: fp32 `[n]`.
    """

    patterns: Tensor
    scales: Tensor
    offsets: Tensor

    def levels(self) -> Tensor:
        """`[n, 2^q]`: the weight of every pattern, summed in the order in which a reader sums."""
        return levels(self.scales, self.offsets)

    def values(self) -> Tensor:
        """`[n, g]`: what a reader gets."""
        return self.levels().gather(1, self.patterns.long())

    def error(self, groups: Tensor, importance: Tensor | None = None) -> Tensor:
        """(Weighted) squared error of each group, fp64 `[n]`."""
        squares = (groups - self.values()).double().square()
        return (squares if importance is None else squares * importance).sum(1)

    def better(self, other: Codes, groups: Tensor, importance: Tensor | None = None) -> Codes:
        """The better of two, group by group; this one where they are equal or the other is not finite."""
        wins = other.error(groups, importance) < self.error(groups, importance)
        return Codes(
            torch.where(wins[:, None], other.patterns, self.patterns),
            torch.where(wins[:, None], other.scales, self.scales),
            torch.where(wins, other.offsets, self.offsets),
        )


def signs(bits: int, like: Tensor) -> Tensor:
    """`[2^q, q]`: the signs that a pattern stands for."""
    patterns, planes = torch.arange(1 << bits, device=like.device), torch.arange(bits, device=like.device)
    return (2 * ((patterns[:, None] >> planes) & 1) - 1).to(like.dtype)


def levels(scales: Tensor, offsets: Tensor) -> Tensor:
    """Scales `[n, q]` and offsets `[n]` -> `[n, 2^q]`, the weight of every pattern."""
    table = signs(scales.shape[1], scales)
    total = table[:, 0] * scales[:, :1]
    for plane in range(1, scales.shape[1]):
        total = total + table[:, plane] * scales[:, plane : plane + 1]
    return total + offsets[:, None]


def nearest(groups: Tensor, scales: Tensor, offsets: Tensor) -> Codes:
    """The best codes for given scales: binary search among the sorted 2^q levels."""
    ordered, order = levels(scales, offsets).sort(dim=1)
    middles = (ordered[:, 1:] + ordered[:, :-1]) / 2
    return Codes(order.gather(1, torch.searchsorted(middles.contiguous(), groups.contiguous())), scales, offsets)


def least_squares(
    groups: Tensor, patterns: Tensor, bits: int, offset: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Optimal scales `[n, q]` and offsets `[n]` for given codes; the small systems are solved in fp64.

    Weights of one pattern enter the normal equations alike, so their (weighted) number and sum are all that is needed.
    """
    basis = signs(bits, groups).double()
    if offset:
        basis = torch.cat([basis, torch.ones_like(basis[:, :1])], dim=1)
    unknowns = basis.shape[1]
    counts = groups.new_zeros(groups.shape[0], 1 << bits)
    sums = counts.clone()
    counts.scatter_add_(1, patterns, torch.ones_like(groups) if importance is None else importance)
    sums.scatter_add_(1, patterns, groups if importance is None else groups * importance)
    products = (basis[:, :, None] * basis[:, None, :]).flatten(1)
    normal = (counts.double() @ products).view(-1, unknowns, unknowns)
    normal.diagonal(dim1=1, dim2=2).add_(RIDGE * groups.shape[1])
    solution = torch.linalg.solve(normal, (sums.double() @ basis)[:, :, None])[:, :, 0].to(groups.dtype)
    return solution[:, :bits], solution[:, bits] if offset else groups.new_zeros(groups.shape[0])


def weighted_mean(values: Tensor, importance: Tensor | None) -> Tensor:
    """`[n, g]` -> `[n]`."""
    if importance is None:
        return values.mean(1)
    return (values * importance).sum(1) / importance.sum(1)


def split_groups(matrix: Tensor, group_size: int) -> list[Tensor]:
    """`[out, in]` -> whole groups `[out * whole, g]`, and the short last groups `[out, rest]` if there are any."""
    group_size = min(group_size, matrix.shape[1])
    whole = matrix.shape[1] // group_size * group_size
    parts = [matrix[:, :whole].reshape(-1, group_size)]
    if whole < matrix.shape[1]:
        parts.append(matrix[:, whole:])
    return parts


def padded_groups(weight: Tensor, group_size: int) -> Tensor:
    """`[out, in]` -> fp32 `[out, groups, g]`; a short last group repeats the last weight, which changes no range."""
    out_features, in_features = weight.shape
    group_size = min(group_size, in_features)
    count = -(-in_features // group_size)
    pad = count * group_size - in_features
    wide = weight.float()
    padded = torch.cat([wide, wide[:, -1:].expand(-1, pad)], dim=1) if pad else wide
    return padded.view(out_features, count, group_size)


def join_groups(found: Sequence[Codes], out_features: int) -> Codes:
    """What became of `split_groups`: patterns `[out, in]`, scales `[out, groups, q]`, offsets `[out, groups]`."""
    bits = found[0].scales.shape[1]
    return Codes(
        torch.cat([codes.patterns.view(out_features, -1) for codes in found], dim=1),
        torch.cat([codes.scales.view(out_features, -1, bits) for codes in found], dim=1),
        torch.cat([codes.offsets.view(out_features, -1) for codes in found], dim=1),
    )


def pack(codes: Codes, group_size: int, offset: bool, scale_dtype: torch.dtype) -> PackedWeight:
    """Codes of a whole matrix (as `join_groups` returns them), coarsest plane first, in the packed format."""
    bits = codes.scales.shape[2]
    return PackedWeight(
        planes=torch.stack([pack_signs((codes.patterns & (1 << plane)) != 0) for plane in range(bits)]),
        scales=codes.scales.permute(2, 0, 1).to(scale_dtype).contiguous(),
        offset=codes.offsets.float().contiguous() if offset else None,
        in_features=codes.patterns.shape[1],
        group_size=min(group_size, codes.patterns.shape[1]),
        sorted=True,
    )
