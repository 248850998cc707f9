"""Binary-coding quantization: a group of weights as a sum of scaled sign vectors, `w ~ sum_i a_i b_i (+ z)`.

Greedy: each plane takes the signs and the mean magnitude of what the earlier ones left (Guo et al., Network Sketching,
CVPR 2017). Alternating: from there, least-squares scales for the codes, then the nearest codes for the scales, in turns
(Xu et al., Alternating Multi-bit Quantization, ICLR 2018, section 3). Per group of inputs, as in LUT-GEMM (Park et al.,
ICLR 2024, section 3).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hcx.errors import ConfigError
from hcx.kernels import PackedWeight
from hcx.kernels.format import MAX_BITS, pack_signs

Method = Literal["greedy", "alternating"]
SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RIDGE = 1e-7
"""Keeps the normal equations solvable where two planes coincide, relative to the group size."""
CHUNK_VALUES = 1 << 20
"""Weights times planes handled at once: bounds the memory, and stays near the caches."""


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int,
    method: Method = "alternating",
    rounds: int = 15,
    offset: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> PackedWeight:
    """Quantizes a weight to binary codes.

    Alternating is never worse than greedy in any group, measured with the scales as stored.

    Args:
        weight: `[out, in]`, finite.
        bits: planes, 1 to 8.
        group_size: inputs that share their scales; the last group may be short; at most a whole row.
        method: `greedy` or `alternating`.
        rounds: of alternation. Two are published as sufficient; at 3 bits and more they are not (15 gain up to 40 %).
        offset: with a constant per group, fitted with the scales.
        scale_dtype: fp16, bf16 or fp32.

    Raises:
        ConfigError: a setting is out of range, the weight is not finite, or its scales overflow `scale_dtype`.
    """
    check_arguments(weight, bits, group_size, scale_dtype)
    if method not in ("greedy", "alternating"):
        raise ConfigError(f"method = {method!r}; allowed: 'greedy', 'alternating'")
    out_features, in_features = weight.shape
    group_size = min(group_size, in_features)
    whole = in_features // group_size
    parts = []
    body = weight[:, : whole * group_size].reshape(out_features, whole, group_size)
    parts.append(_quantize_rows(body, bits, method, rounds, offset, scale_dtype))
    if in_features % group_size:
        tail = weight[:, whole * group_size :].reshape(out_features, 1, -1)
        parts.append(_quantize_rows(tail, bits, method, rounds, offset, scale_dtype))
    positive = torch.cat([codes.flatten(2) for codes, _, _ in parts], dim=2)
    scales = torch.cat([found for _, found, _ in parts], dim=2)
    return PackedWeight(
        planes=pack_signs(positive),
        scales=scales.to(scale_dtype),
        offset=torch.cat([found for _, _, found in parts], dim=1) if offset else None,
        in_features=in_features,
        group_size=group_size,
        sorted=True,
    )


def check_arguments(weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype) -> None:
    """Refuses what no quantizer here can do."""
    if weight.dim() != 2:
        raise ConfigError(f"a weight of shape {tuple(weight.shape)}; expected [out, in]")
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"bits = {bits}; allowed: 1 to {MAX_BITS}")
    if group_size < 1:
        raise ConfigError(f"group_size = {group_size}; must be at least 1")
    if not torch.isfinite(weight).all():
        raise ConfigError("the weight holds values that are not finite; the model is damaged or diverged")
    largest = float(weight.abs().max())
    if largest > torch.finfo(scale_dtype).max:
        raise ConfigError(f"the largest weight, {largest:.3g}, overflows {scale_dtype} scales; use scale_dtype: fp32")


def _quantize_rows(
    groups: Tensor, bits: int, method: Method, rounds: int, offset: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes bool `[q, out, groups, g]`, scales `[q, out, groups]`, offset `[out, groups]` of `[out, groups, g]`."""
    out_features, count, size = groups.shape
    flat = groups.reshape(-1, size).float()
    step = max(1, CHUNK_VALUES // (size * bits))
    found = [
        _quantize_groups(flat[start : start + step], bits, method, rounds, offset, scale_dtype)
        for start in range(0, flat.shape[0], step)
    ]
    codes = torch.cat([part[0] for part in found], dim=1)
    scales = torch.cat([part[1] for part in found], dim=1)
    offsets = torch.cat([part[2] for part in found])
    shape = (out_features, count)
    return codes.view(bits, *shape, size), scales.view(bits, *shape), offsets.view(shape)


def _quantize_groups(
    groups: Tensor, bits: int, method: Method, rounds: int, offset: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk `[n, g]` -> codes bool `[q, n, g]`, scales `[q, n]`, offsets `[n]`, coarsest plane first."""
    codes, scales, offsets = _greedy(groups, bits, offset)
    if method == "alternating":
        better = _alternate(groups, codes, scales, offsets, rounds, offset)
        first = _error(groups, codes, scales, offsets, scale_dtype)
        second = _error(groups, *better, scale_dtype)
        # Rounding the scales may cost more than the alternation gained: the better one is kept, group by group.
        wins = second < first
        codes = torch.where(wins[None, :, None], better[0], codes)
        scales = torch.where(wins, better[1], scales)
        offsets = torch.where(wins, better[2], offsets)
    return _coarsest_first(codes, scales, offsets)


def _greedy(groups: Tensor, bits: int, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    offsets = groups.mean(1) if offset else groups.new_zeros(groups.shape[0])
    rest = groups - offsets[:, None]
    codes, scales = [], []
    for _ in range(bits):
        positive = rest >= 0  # sign(0) is +1: a code has no zero
        scale = rest.abs().mean(1)
        rest = rest - torch.where(positive, scale[:, None], -scale[:, None])
        codes.append(positive)
        scales.append(scale)
    return torch.stack(codes), torch.stack(scales), offsets


def _alternate(
    groups: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, rounds: int, offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    for _ in range(rounds):
        scales, offsets = _least_squares(groups, codes, offset)
        codes = _nearest_codes(groups - offsets[:, None], scales)
    scales, offsets = _least_squares(groups, codes, offset)
    return codes, scales, offsets


def _least_squares(groups: Tensor, codes: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    """Optimal scales `[q, n]` and offsets `[n]` for given codes; the small systems are solved in fp64."""
    bits, count, size = codes.shape
    basis = codes.permute(1, 0, 2).to(groups.dtype).mul_(2).sub_(1)
    if offset:
        basis = torch.cat([basis, torch.ones_like(basis[:, :1])], dim=1)
    # Entries of the products of signs are integers: exact in fp32 up to 2^24 inputs.
    normal = (basis @ basis.transpose(1, 2)).double()
    normal.diagonal(dim1=1, dim2=2).add_(RIDGE * size)
    right = (basis @ groups[:, :, None]).double()
    solution = torch.linalg.solve(normal, right)[:, :, 0].to(groups.dtype)
    scales = solution[:, :bits].t().contiguous()
    return scales, solution[:, bits] if offset else groups.new_zeros(count)


def _nearest_codes(groups: Tensor, scales: Tensor) -> Tensor:
    """The best codes bool `[q, n, g]` for given scales: binary search among the sorted 2^q sums."""
    bits = scales.shape[0]
    patterns = (torch.arange(1 << bits, device=groups.device)[:, None] >> torch.arange(bits, device=groups.device)) & 1
    signs = (2 * patterns - 1).to(groups.dtype)  # [2^q, q]
    values, order = (signs @ scales).t().sort(dim=1)  # [n, 2^q]
    middles = (values[:, 1:] + values[:, :-1]) / 2
    place = torch.searchsorted(middles.contiguous(), groups.contiguous())
    chosen = order.to(torch.uint8).gather(1, place)
    return torch.stack([(chosen & (1 << plane)) != 0 for plane in range(bits)])


def _error(groups: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Squared error `[n]` with the scales as stored."""
    stored = scales.to(scale_dtype).to(groups.dtype)
    rest = groups - offsets[:, None]
    for positive, scale in zip(codes, stored, strict=True):
        rest = rest - torch.where(positive, scale[:, None], -scale[:, None])
    return rest.square().sum(1)


def _coarsest_first(codes: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positive scales in falling order: a negative one flips its plane, and planes change places; the sum is equal."""
    codes = codes ^ (scales < 0)[:, :, None]
    scales, order = scales.abs().sort(dim=0, descending=True, stable=True)
    return codes.gather(0, order[:, :, None].expand_as(codes)), scales, offsets
