"""Uniform quantization, rounded to nearest or with a searched range, and its exact conversion to planes and an offset.

`w = s (u - u0)` with `u = sum_j 2^j bit_j` is `sum_j (s 2^(j-1)) (2 bit_j - 1) + s ((2^q - 1) / 2 - u0)`: binary codes
whose scales are powers of two apart (LUT-GEMM, Park et al., ICLR 2024, section 3). So one kernel serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hcx.compress.bcq import check_arguments, split_importance
from hcx.compress.codes import Codes, join_groups, nearest, pack, padded_groups, split_groups, weighted_mean
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight
from hcx.kernels.format import MAX_BITS, pack_signs

CLIPS = tuple(1 - 0.05 * step for step in range(15))
"""Ranges that the search tries, relative to the whole range of a group: 1 down to 0.3."""
REFINEMENTS = 5
"""Least-squares steps and offsets after the search, with codes chosen anew: most of the gain comes in three."""
CHUNK_VALUES = 1 << 20
"""Weights searched at once, to bound the memory."""


def quantize_uniform(
    weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> PackedWeight:
    """Asymmetric round-to-nearest between the smallest and the largest weight of each group.

    No weight moves by more than half a step.

    Args:
        weight: `[out, in]`, finite.
        bits: 1 to 8.
        group_size: inputs per step size and offset; the last group may be short.
        scale_dtype: of the step sizes, which are rounded before the codes are chosen.

    Raises:
        ConfigError: a setting is out of range, or the weight is not finite.
    """
    check_arguments(weight, bits, group_size, scale_dtype)
    in_features = weight.shape[1]
    group_size = min(group_size, in_features)
    groups = padded_groups(weight, group_size)
    low, high = groups.amin(2), groups.amax(2)
    levels = (1 << bits) - 1
    # The finest scale is half a step. It is rounded up, so that the grid still reaches both ends of the group.
    half = _round_up((high / 2 - low / 2) / levels, scale_dtype)
    # Around the middle: a rounded-up grid sticks out on both sides alike.
    offset = low / 2 + high / 2
    lowest = offset - half * levels
    step = torch.where(half > 0, 2 * half, 1.0)
    codes = ((groups - lowest[:, :, None]) / step[:, :, None]).round_().clamp_(0, levels).to(torch.uint8)
    return _planes(codes.flatten(1)[:, :in_features], half, offset, bits, group_size, scale_dtype)


def search_uniform(
    weight: Tensor,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype = torch.float16,
    importance: Tensor | None = None,
) -> PackedWeight:
    """Uniform grids whose range and place make the (weighted) squared error small: outliers may be worth cutting.

    Never worse than rounding to nearest over the whole range, in any group.

    Args:
        weight: `[out, in]`, finite.
        bits: 1 to 8.
        group_size: inputs per step size and offset; the last group may be short.
        scale_dtype: of the step sizes.
        importance: `[in]`, not negative: how much a squared error of each column counts; alike if not given.

    Raises:
        ConfigError: a setting is out of range, or the weight is not finite.
    """
    check_arguments(weight, bits, group_size, scale_dtype)
    parts = split_groups(weight.float(), group_size)
    factors = split_importance(importance, weight, group_size)
    found = []
    for part, factor in zip(parts, factors, strict=True):
        step = max(1, CHUNK_VALUES // part.shape[1])
        chunks = [
            searched_groups(
                part[begin : begin + step],
                bits,
                scale_dtype,
                factor if factor is None else factor[begin : begin + step],
            )
            for begin in range(0, len(part), step)
        ]
        found.append(
            Codes(
                torch.cat([codes.patterns.to(torch.uint8) for codes in chunks]),
                torch.cat([codes.scales for codes in chunks]),
                torch.cat([codes.offsets for codes in chunks]),
            )
        )
    return pack(join_groups(found, weight.shape[0]), group_size, True, scale_dtype)


def rounded_groups(groups: Tensor, bits: int, scale_dtype: torch.dtype) -> Codes:
    """Groups `[n, g]` rounded to the grid between their smallest and their largest weight."""
    return _on_grid(groups, *_range_grid(groups, bits, scale_dtype), bits)


def searched_groups(groups: Tensor, bits: int, scale_dtype: torch.dtype, importance: Tensor | None = None) -> Codes:
    """Groups `[n, g]` on the best grids found; scales hold values of `scale_dtype`."""
    half, middle = _range_grid(groups, bits, scale_dtype)
    best = _on_grid(groups, half, middle, bits)
    for clip in CLIPS[1:]:
        best = best.better(_on_grid(groups, _stored(clip * half, bits, scale_dtype), middle, bits), groups, importance)
    for _ in range(REFINEMENTS):
        # Regression of the weights on the codes u = -levels, ..., levels (odd steps): w ~ half u + middle.
        half = best.scales[:, -1:]
        codes = torch.where(half > 0, (best.values() - best.offsets[:, None]) / torch.where(half > 0, half, 1.0), 0.0)
        mean_code, mean = weighted_mean(codes, importance), weighted_mean(groups, importance)
        centred = codes - mean_code[:, None]
        spread = weighted_mean(centred.square(), importance)
        slope = weighted_mean(centred * (groups - mean[:, None]), importance) / torch.where(spread > 0, spread, 1.0)
        found = _stored(slope.clamp(min=0), bits, scale_dtype)
        best = best.better(_on_grid(groups, found, mean - found * mean_code, bits), groups, importance)
    return best


def _range_grid(groups: Tensor, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Half a step and the middle, each `[n]`, of the grid that just reaches both ends of each group."""
    low, high = groups.amin(1), groups.amax(1)
    return _round_up((high / 2 - low / 2) / ((1 << bits) - 1), scale_dtype), low / 2 + high / 2


def _stored(half: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    """Half a step as the scales hold it; every plane's scale is it times a power of two."""
    return half.clamp(max=torch.finfo(scale_dtype).max / 2 ** (bits - 1)).to(scale_dtype).float()


def _on_grid(groups: Tensor, half: Tensor, middle: Tensor, bits: int) -> Codes:
    powers = 2.0 ** torch.arange(bits - 1, -1, -1, device=groups.device, dtype=groups.dtype)
    return nearest(groups, half[:, None] * powers, middle)


def from_uniform(
    codes: Tensor,
    step: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype = torch.float16,
) -> PackedWeight:
    """Converts a weight `step * (codes - zero_point)` that another quantizer made (RTN, GPTQ, AWQ), without loss.

    With steps of fp16 or bf16 and zero points that are multiples of 1/2, the dequantized weight equals
    `step * (codes - zero_point)` in fp32 bit for bit.

    Args:
        codes: integers `[out, in]` from 0 to `2^bits - 1`.
        step, zero_point: `[out, ceil(in / group_size)]`.
        bits: 1 to 8.
        group_size: inputs per step.
        scale_dtype: must hold half a step exactly.

    Raises:
        ConfigError: shapes or codes are out of range, or `scale_dtype` cannot hold the scales exactly.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"bits = {bits}; allowed: 1 to {MAX_BITS}")
    if int(codes.min()) < 0 or int(codes.max()) >= 1 << bits:
        raise ConfigError(f"codes from {int(codes.min())} to {int(codes.max())}; {bits} bits hold 0 to {2**bits - 1}")
    expected = (codes.shape[0], -(-codes.shape[1] // group_size))
    if tuple(step.shape) != expected or tuple(zero_point.shape) != expected:
        raise ConfigError(f"step {tuple(step.shape)}, zero_point {tuple(zero_point.shape)}; expected {expected}")
    step = step.float()
    half, coarsest = step / 2, step * 2.0 ** (bits - 2)
    for scale in (half, coarsest):
        if not torch.equal(scale.to(scale_dtype).float(), scale):
            raise ConfigError(f"{scale_dtype} does not hold these steps exactly; use scale_dtype: fp32")
    offset = step * (((1 << bits) - 1) / 2 - zero_point.float())
    return _planes(codes.to(torch.uint8), half, offset, bits, group_size, scale_dtype)


def _planes(
    codes: Tensor, half: Tensor, offset: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype
) -> PackedWeight:
    """Codes uint8 `[out, in]`, half steps and the middles of the grids `[out, groups]`, as planes, coarsest first."""
    falling = range(bits - 1, -1, -1)
    return PackedWeight(
        planes=torch.stack([pack_signs((codes & (1 << plane)) != 0) for plane in falling]),
        scales=torch.stack([half * (1 << plane) for plane in falling]).to(scale_dtype),
        offset=offset,
        in_features=codes.shape[1],
        group_size=group_size,
        sorted=True,
    )


def _round_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of `dtype` that are not below these non-negative ones, in fp32."""
    rounded = values.to(dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    # The bits of positive floating-point numbers count upwards with them.
    following = (rounded.view(integer) + 1).view(dtype)
    return torch.where(rounded.float() < values, following, rounded).float()
