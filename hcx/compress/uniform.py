"""Uniform quantization by rounding to nearest, and the exact conversion of any uniform weight to planes and an offset.

`w = s (u - u0)` with `u = sum_j 2^j bit_j` is `sum_j (s 2^(j-1)) (2 bit_j - 1) + s ((2^q - 1) / 2 - u0)`: binary codes
whose scales are powers of two apart (LUT-GEMM, Park et al., ICLR 2024, section 3). So one kernel serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hcx.compress.bcq import check_arguments
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight
from hcx.kernels.format import MAX_BITS, pack_signs


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
    out_features, in_features = weight.shape
    group_size = min(group_size, in_features)
    count = -(-in_features // group_size)
    pad = count * group_size - in_features
    wide = weight.float()
    # Padding repeats the last weight of a row, which changes no group's range.
    padded = torch.cat([wide, wide[:, -1:].expand(-1, pad)], dim=1) if pad else wide
    groups = padded.view(out_features, count, group_size)
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
