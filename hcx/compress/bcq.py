"""Binary-coding quantization: a group of weights as a sum of scaled sign vectors, `w ~ sum_i a_i b_i (+ z)`.

Greedy: each plane takes the signs and the mean magnitude of what the earlier ones left (Guo et al., Network Sketching,
CVPR 2017). Alternating: from a start, least-squares scales for the codes, then the nearest codes for the scales, in
turns (Xu et al., Alternating Multi-bit Quantization, ICLR 2018, section 3). Per group of inputs, as in LUT-GEMM (Park
et al., ICLR 2024, section 3).

Alternation only finds the optimum next to its start. From the greedy one it ends above plain rounding at 4 bits and
more, so a uniform grid is the second start (binary codes contain every uniform grid), and the better end is kept group
by group. All comparisons count the rounding of scales to the type they are stored in.

A weight's codes over all planes are one number here, its *pattern*: bit `i` is set where plane `i` is +1.
"""

from __future__ import annotations

from dataclasses import dataclass
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
CHUNK_VALUES = 1 << 18
"""Weights handled at once: bounds the memory, and stays near the caches."""
CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Ranges tried for the uniform start, relative to the largest magnitude: outliers may be worth cutting."""


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
    if rounds < 0:
        raise ConfigError(f"rounds = {rounds}; must be at least 0")
    out_features, in_features = weight.shape
    group_size = min(group_size, in_features)
    whole = in_features // group_size * group_size
    parts = [weight[:, :whole].reshape(-1, group_size)]
    if whole < in_features:
        parts.append(weight[:, whole:])
    found = [_quantize_rows(part.float(), bits, method, rounds, offset, scale_dtype) for part in parts]
    patterns = torch.cat([codes.patterns.view(out_features, -1) for codes in found], dim=1)
    scales = torch.cat([codes.scales.view(out_features, -1, bits) for codes in found], dim=1)
    offsets = torch.cat([codes.offsets.view(out_features, -1) for codes in found], dim=1)
    return PackedWeight(
        planes=torch.stack([pack_signs((patterns & (1 << plane)) != 0) for plane in range(bits)]),
        scales=scales.permute(2, 0, 1).to(scale_dtype).contiguous(),
        offset=offsets if offset else None,
        in_features=in_features,
        group_size=group_size,
        sorted=True,
    )


def check_arguments(weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype) -> None:
    """Refuses what no quantizer here can do."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ConfigError(f"a weight of shape {tuple(weight.shape)}; expected [out, in]")
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"bits = {bits}; allowed: 1 to {MAX_BITS}")
    if group_size < 1:
        raise ConfigError(f"group_size = {group_size}; must be at least 1")
    if scale_dtype not in SCALE_DTYPES.values():
        raise ConfigError(f"scale_dtype = {scale_dtype}; allowed: {', '.join(SCALE_DTYPES)}")
    if not torch.isfinite(weight).all():
        raise ConfigError("the weight holds values that are not finite; the model is damaged or diverged")
    largest = float(weight.abs().max())
    if largest > torch.finfo(scale_dtype).max:
        raise ConfigError(f"the largest weight, {largest:.3g}, overflows {scale_dtype} scales; use scale_dtype: fp32")


@dataclass
class _Codes:
    """Codes of `n` groups of `g` weights.

    Attributes:
        patterns: int64 `[n, g]`.
        scales: fp32 `[n, q]`.
        offsets: fp32 `[n]`.
    """

    patterns: Tensor
    scales: Tensor
    offsets: Tensor

    def levels(self) -> Tensor:
        """`[n, 2^q]`: the weight of every pattern, summed in the order in which a reader sums."""
        signs = _signs(self.scales.shape[1], self.scales)
        total = signs[:, 0] * self.scales[:, :1]
        for plane in range(1, self.scales.shape[1]):
            total = total + signs[:, plane] * self.scales[:, plane : plane + 1]
        return total + self.offsets[:, None]

    def error(self, groups: Tensor) -> Tensor:
        """Squared error of each group, fp64 `[n]`."""
        return (groups - self.levels().gather(1, self.patterns)).double().square().sum(1)

    def better(self, other: _Codes, groups: Tensor) -> _Codes:
        """The better of two, group by group; this one where they are equal or the other is not finite."""
        wins = other.error(groups) < self.error(groups)
        return _Codes(
            torch.where(wins[:, None], other.patterns, self.patterns),
            torch.where(wins[:, None], other.scales, self.scales),
            torch.where(wins, other.offsets, self.offsets),
        )


def _quantize_rows(
    groups: Tensor, bits: int, method: Method, rounds: int, offset: bool, scale_dtype: torch.dtype
) -> _Codes:
    """Codes of `[n, g]`, chunk by chunk."""
    step = max(1, CHUNK_VALUES // max(groups.shape[1], 1 << bits))
    found = [_quantize_groups(chunk, bits, method, rounds, offset, scale_dtype) for chunk in groups.split(step)]
    return _Codes(
        torch.cat([codes.patterns.to(torch.uint8) for codes in found]),
        torch.cat([codes.scales for codes in found]),
        torch.cat([codes.offsets for codes in found]),
    )


def _quantize_groups(
    groups: Tensor, bits: int, method: Method, rounds: int, offset: bool, scale_dtype: torch.dtype
) -> _Codes:
    """One chunk `[n, g]`; scales hold values of `scale_dtype`, coarsest plane first."""
    best = _greedy(groups, bits, offset, scale_dtype)
    if method == "greedy":
        return best
    starts = [best]
    if bits > 2:
        starts.append(_uniform(groups, bits, offset))
    for start in starts:
        for codes in (start, _alternate(groups, start, rounds, offset)):
            best = best.better(_as_stored(groups, codes, offset, scale_dtype), groups)
    return best


def _greedy(groups: Tensor, bits: int, offset: bool, scale_dtype: torch.dtype) -> _Codes:
    offsets = groups.mean(1) if offset else groups.new_zeros(groups.shape[0])
    rest = groups - offsets[:, None]
    planes, scales = [], []
    for _ in range(bits):
        positive = rest >= 0  # sign(0) is +1: a code has no zero
        # The next plane sees what this one leaves as stored, so it takes up the rounding too.
        scale = rest.abs().mean(1).to(scale_dtype).float()
        rest = rest - torch.where(positive, scale[:, None], -scale[:, None])
        planes.append(positive)
        scales.append(scale)
    # A few large values among small ones make a later scale larger than an earlier one.
    ordered, order = torch.stack(scales, 1).sort(dim=1, descending=True, stable=True)
    stacked = torch.stack(planes, 1).gather(1, order[:, :, None].expand(-1, -1, groups.shape[1]))
    patterns = torch.zeros_like(groups, dtype=torch.int64)
    for plane in range(bits):
        patterns += stacked[:, plane].long() << plane
    return _Codes(patterns, ordered, offsets)


def _uniform(groups: Tensor, bits: int, offset: bool) -> _Codes:
    """The best of a few uniform grids around the middle of each group (around zero without an offset)."""
    if offset:
        low, high = groups.amin(1), groups.amax(1)
        offsets, reach = (low + high) / 2, (high - low) / 2
    else:
        offsets, reach = groups.new_zeros(groups.shape[0]), groups.abs().amax(1)
    powers = 2.0 ** torch.arange(bits - 1, -1, -1, device=groups.device, dtype=groups.dtype)
    best: _Codes | None = None
    for clip in CLIPS:
        codes = _nearest(groups, clip * reach[:, None] / ((1 << bits) - 1) * powers, offsets)
        best = codes if best is None else best.better(codes, groups)
    assert best is not None
    return best


def _alternate(groups: Tensor, codes: _Codes, rounds: int, offset: bool) -> _Codes:
    patterns, scales, offsets = codes.patterns.clone(), codes.scales.clone(), codes.offsets.clone()
    active = torch.arange(groups.shape[0], device=groups.device)
    for _ in range(rounds):
        found, shifts = _least_squares(groups[active], patterns[active], scales.shape[1], offset)
        nearest = _nearest(groups[active], found, shifts)
        changed = (nearest.patterns != patterns[active]).any(1)
        patterns[active], scales[active], offsets[active] = nearest.patterns, found, shifts
        # Codes that stay give the same scales again: such a group has arrived.
        active = active[changed]
        if not len(active):
            break
    scales[active], offsets[active] = _least_squares(groups[active], patterns[active], scales.shape[1], offset)
    return _Codes(patterns, scales, offsets)


def _as_stored(groups: Tensor, codes: _Codes, offset: bool, scale_dtype: torch.dtype) -> _Codes:
    """Rounds the scales, and chooses codes and offset anew for what is left of them."""
    # Falling magnitudes: a negative scale is a flipped plane, and the nearest codes see to that.
    scales = codes.scales.abs().sort(dim=1, descending=True).values.to(scale_dtype).float()
    stored = _nearest(groups, scales, codes.offsets)
    if offset:
        stored.offsets = stored.offsets + (groups - stored.levels().gather(1, stored.patterns)).mean(1)
    return stored


def _least_squares(groups: Tensor, patterns: Tensor, bits: int, offset: bool) -> tuple[Tensor, Tensor]:
    """Optimal scales `[n, q]` and offsets `[n]` for given codes; the small systems are solved in fp64.

    Weights of one pattern enter the normal equations alike, so their number and their sum are all that is needed.
    """
    basis = _signs(bits, groups).double()
    if offset:
        basis = torch.cat([basis, torch.ones_like(basis[:, :1])], dim=1)
    unknowns = basis.shape[1]
    counts = groups.new_zeros(groups.shape[0], 1 << bits)
    sums = counts.clone()
    counts.scatter_add_(1, patterns, torch.ones_like(groups))
    sums.scatter_add_(1, patterns, groups)
    products = (basis[:, :, None] * basis[:, None, :]).flatten(1)
    normal = (counts.double() @ products).view(-1, unknowns, unknowns)
    normal.diagonal(dim1=1, dim2=2).add_(RIDGE * groups.shape[1])
    solution = torch.linalg.solve(normal, (sums.double() @ basis)[:, :, None])[:, :, 0].to(groups.dtype)
    return solution[:, :bits], solution[:, bits] if offset else groups.new_zeros(groups.shape[0])


def _nearest(groups: Tensor, scales: Tensor, offsets: Tensor) -> _Codes:
    """The best codes for given scales: binary search among the sorted 2^q levels."""
    codes = _Codes(scales.new_zeros(0), scales, offsets)
    levels, order = codes.levels().sort(dim=1)
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    codes.patterns = order.gather(1, torch.searchsorted(middles.contiguous(), groups.contiguous()))
    return codes


def _signs(bits: int, like: Tensor) -> Tensor:
    """`[2^q, q]`: the signs that a pattern stands for."""
    patterns, planes = torch.arange(1 << bits, device=like.device), torch.arange(bits, device=like.device)
    return (2 * ((patterns[:, None] >> planes) & 1) - 1).to(like.dtype)
