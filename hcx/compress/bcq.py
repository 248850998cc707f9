"""Binary-coding quantization: a group of weights as a sum of scaled sign vectors, `w ~ sum_i a_i b_i (+ z)`.

Greedy: each plane takes the signs and the mean magnitude of what the earlier ones left; refined greedy solves all
scales so far anew after each plane (Guo et al., Network Sketching, CVPR 2017). Alternating: from a start,
least-squares scales for the codes, then the nearest codes for the scales, in turns (Xu et al., Alternating Multi-bit
Quantization, ICLR 2018, section 3). Per group of inputs, as in LUT-GEMM (Park et al., ICLR 2024, section 3).

Alternation only finds the optimum next to its start. From the greedy one it ends above plain rounding at 4 bits and
more, so a uniform grid is the second start (binary codes contain every uniform grid), and the better end is kept group
by group. All comparisons count the rounding of scales to the type they are stored in.

With an importance per input (the second moment of what the layer reads there), errors are weighted: the expected
squared error of the layer's output, were its inputs uncorrelated.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hcx.compress.codes import Codes, join_groups, least_squares, nearest, pack, split_groups, weighted_mean
from hcx.errors import ConfigError, did_you_mean
from hcx.kernels import PackedWeight, coding, native
from hcx.kernels.format import MAX_BITS

Method = Literal["greedy", "refined", "alternating"]
METHODS: tuple[Method, ...] = ("greedy", "refined", "alternating")
SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHUNK_VALUES = 1 << 18
"""Weights handled at once: bounds the memory, and stays near the caches."""
CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Ranges tried for the uniform start, relative to the largest magnitude: outliers may be worth cutting."""
LEAST_IMPORTANCE = 1e-4
"""Relative to the mean: an input that calibration never saw still counts a little, and every group has a solution."""


def quantize(
    weight: Tensor,
    bits: int,
    group_size: int,
    method: Method = "alternating",
    rounds: int = 15,
    offset: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    importance: Tensor | None = None,
    reference: bool = False,
) -> PackedWeight:
    """Quantizes a weight to binary codes.

    Alternating is never worse than greedy in any group, measured with the scales as stored.

    Args:
        weight: `[out, in]`, finite.
        bits: planes, 1 to 8.
        group_size: inputs that share their scales; the last group may be short; at most a whole row.
        method: `greedy`, `refined` or `alternating`.
        rounds: of alternation. Two are published as sufficient; at 3 bits and more they are not (15 gain up to 40 %).
        offset: with a constant per group, fitted with the scales.
        scale_dtype: fp16, bf16 or fp32.
        importance: `[in]`, not negative: how much a squared error of each column counts; alike if not given.
        reference: in torch, also where there is a native library.

    Raises:
        ConfigError: a setting is out of range, the weight is not finite, or its scales overflow `scale_dtype`.
    """
    check_arguments(weight, bits, group_size, scale_dtype)
    if method not in METHODS:
        raise ConfigError(f"method = {method!r}; {did_you_mean(method, METHODS)}")
    if rounds < 0:
        raise ConfigError(f"rounds = {rounds}; must be at least 0")
    parts = split_groups(weight, group_size)
    factors = split_importance(importance, weight, group_size)
    found = [
        _quantize_rows(part.float(), factor, bits, method, rounds, offset, scale_dtype, reference)
        for part, factor in zip(parts, factors, strict=True)
    ]
    return pack(join_groups(found, weight.shape[0]), group_size, offset, scale_dtype)


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


def checked_importance(importance: Tensor, in_features: int) -> Tensor:
    """An importance per column, fp32 `[in]`, mean 1 and nowhere zero.

    Raises:
        ConfigError: the shape is another, or a value is negative or not finite.
    """
    if tuple(importance.shape) != (in_features,):
        raise ConfigError(
            f"an importance of shape {tuple(importance.shape)}; expected one per column, ({in_features},)"
        )
    if not torch.isfinite(importance).all() or bool((importance < 0).any()):
        raise ConfigError("the importance holds values that are negative or not finite; calibration is damaged")
    mean = importance.double().mean()
    if mean == 0:
        return torch.ones_like(importance, dtype=torch.float32)
    return (importance.double() / mean).clamp(min=LEAST_IMPORTANCE).float()


def split_importance(importance: Tensor | None, weight: Tensor, group_size: int) -> list[Tensor | None]:
    """The importance of every weight, divided as `split_groups` divides the weights; a row of it is repeated."""
    if importance is None:
        return [None] * len(split_groups(weight[:1], group_size))
    row = checked_importance(importance, weight.shape[1])
    parts = split_groups(row[None], group_size)
    return [part.repeat(weight.shape[0], 1) for part in parts]


def _quantize_rows(
    groups: Tensor,
    importance: Tensor | None,
    bits: int,
    method: Method,
    rounds: int,
    offset: bool,
    scale_dtype: torch.dtype,
    reference: bool,
) -> Codes:
    """Codes of `[n, g]`, chunk by chunk."""
    code = quantize_groups_reference if reference else quantize_groups
    step = max(1, CHUNK_VALUES // max(groups.shape[1], 1 << bits))
    factors = [None] * -(-len(groups) // step) if importance is None else importance.split(step)
    found = [
        code(chunk, bits, method, rounds, offset, scale_dtype, factor)
        for chunk, factor in zip(groups.split(step), factors, strict=True)
    ]
    return Codes(
        torch.cat([codes.patterns.to(torch.uint8) for codes in found]),
        torch.cat([codes.scales for codes in found]),
        torch.cat([codes.offsets for codes in found]),
    )


def quantize_groups(
    groups: Tensor,
    bits: int,
    method: Method,
    rounds: int,
    offset: bool,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
) -> Codes:
    """Groups `[n, g]`, each by itself; scales hold values of `scale_dtype`, coarsest plane first.

    The native library alternates where there is one (some ten times as fast); see `quantize_groups_reference`.
    """
    if method == "alternating" and groups.device.type == "cpu" and coder() == "native":
        return Codes(*coding.alternate(groups, importance, bits, rounds, offset, scale_dtype))
    return quantize_groups_reference(groups, bits, method, rounds, offset, scale_dtype, importance)


def coder() -> str:
    """What alternates on a CPU: `native` or `torch`. Their codes have the same error, but not always the same bits."""
    return "torch" if native.why_absent() else "native"


def quantize_groups_reference(
    groups: Tensor,
    bits: int,
    method: Method,
    rounds: int,
    offset: bool,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
) -> Codes:
    """`quantize_groups` in torch, on any device."""
    best = _greedy(groups, importance, bits, offset, scale_dtype)
    if method == "greedy":
        return best
    refined = _refined(groups, importance, bits, offset)
    if method == "refined":
        return best.better(_as_stored(groups, importance, refined, offset, scale_dtype), groups, importance)
    starts = [best]
    if bits > 2:
        starts.append(_uniform(groups, importance, bits, offset))
    for start in starts:
        for codes in (start, _alternate(groups, importance, start, rounds, offset)):
            best = best.better(_as_stored(groups, importance, codes, offset, scale_dtype), groups, importance)
    return best


def _greedy(groups: Tensor, importance: Tensor | None, bits: int, offset: bool, scale_dtype: torch.dtype) -> Codes:
    offsets = weighted_mean(groups, importance) if offset else groups.new_zeros(groups.shape[0])
    rest = groups - offsets[:, None]
    planes, scales = [], []
    for _ in range(bits):
        positive = rest >= 0  # sign(0) is +1: a code has no zero
        # The next plane sees what this one leaves as stored, so it takes up the rounding too.
        scale = weighted_mean(rest.abs(), importance).to(scale_dtype).float()
        rest = rest - torch.where(positive, scale[:, None], -scale[:, None])
        planes.append(positive)
        scales.append(scale)
    # A few large values among small ones make a later scale larger than an earlier one.
    ordered, order = torch.stack(scales, 1).sort(dim=1, descending=True, stable=True)
    stacked = torch.stack(planes, 1).gather(1, order[:, :, None].expand(-1, -1, groups.shape[1]))
    patterns = torch.zeros_like(groups, dtype=torch.int64)
    for plane in range(bits):
        patterns += stacked[:, plane].long() << plane
    return Codes(patterns, ordered, offsets)


def _refined(groups: Tensor, importance: Tensor | None, bits: int, offset: bool) -> Codes:
    """All scales solved anew after each plane's signs (Guo et al., section 3.2).

    `_as_stored` then takes the nearest codes for the last scales, which the paper does not.
    """
    patterns = torch.zeros_like(groups, dtype=torch.int64)
    offsets = weighted_mean(groups, importance) if offset else groups.new_zeros(groups.shape[0])
    codes = Codes(patterns, groups.new_zeros(groups.shape[0], 0), offsets)
    rest = groups - offsets[:, None]
    for plane in range(bits):
        patterns = patterns + ((rest >= 0).long() << plane)
        codes = Codes(patterns, *least_squares(groups, patterns, plane + 1, offset, importance))
        rest = groups - codes.values()
    return codes


def _uniform(groups: Tensor, importance: Tensor | None, bits: int, offset: bool) -> Codes:
    """The best of a few uniform grids around the middle of each group (around zero without an offset)."""
    if offset:
        low, high = groups.amin(1), groups.amax(1)
        offsets, reach = (low + high) / 2, (high - low) / 2
    else:
        offsets, reach = groups.new_zeros(groups.shape[0]), groups.abs().amax(1)
    powers = 2.0 ** torch.arange(bits - 1, -1, -1, device=groups.device, dtype=groups.dtype)
    best: Codes | None = None
    for clip in CLIPS:
        codes = nearest(groups, clip * reach[:, None] / ((1 << bits) - 1) * powers, offsets)
        best = codes if best is None else best.better(codes, groups, importance)
    assert best is not None
    return best


def _alternate(groups: Tensor, importance: Tensor | None, codes: Codes, rounds: int, offset: bool) -> Codes:
    patterns, scales, offsets = codes.patterns.clone(), codes.scales.clone(), codes.offsets.clone()
    active = torch.arange(groups.shape[0], device=groups.device)
    bits = scales.shape[1]

    def solved() -> tuple[Tensor, Tensor]:
        factor = None if importance is None else importance[active]
        return least_squares(groups[active], patterns[active], bits, offset, factor)

    for _ in range(rounds):
        found, shifts = solved()
        closest = nearest(groups[active], found, shifts)
        changed = (closest.patterns != patterns[active]).any(1)
        patterns[active], scales[active], offsets[active] = closest.patterns, found, shifts
        # Codes that stay give the same scales again: such a group has arrived.
        active = active[changed]
        if not len(active):
            break
    scales[active], offsets[active] = solved()
    return Codes(patterns, scales, offsets)


def _as_stored(
    groups: Tensor, importance: Tensor | None, codes: Codes, offset: bool, scale_dtype: torch.dtype
) -> Codes:
    """Rounds the scales, and chooses codes and offset anew for what is left of them."""
    # Falling magnitudes: a negative scale is a flipped plane, and the nearest codes see to that.
    scales = codes.scales.abs().sort(dim=1, descending=True).values.to(scale_dtype).float()
    stored = nearest(groups, scales, codes.offsets)
    if offset:
        stored.offsets = stored.offsets + weighted_mean(groups - stored.values(), importance)
    return stored
