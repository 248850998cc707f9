"""Uniform quantization by rounding to nearest, converted exactly to planes and an offset.

`w ~ s k + m` with `k = sum_j 2^j bit_j` is `sum_j (s 2^(j-1)) (2 bit_j - 1) + (m + s (2^q - 1) / 2)`: binary codes
whose scales are powers of two apart (LUT-GEMM, Park et al., ICLR 2024, section 3). So one kernel serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hcx.compress.bcq import check_arguments
from hcx.kernels import PackedWeight
from hcx.kernels.format import pack_signs


def quantize_uniform(
    weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> PackedWeight:
    """Asymmetric round-to-nearest between the smallest and the largest weight of each group.

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
    # The finest scale is half a step: rounding that keeps every scale exact, also where halving would leave the range.
    half = ((high - low) / (2 * levels)).to(scale_dtype).float()
    step = 2 * half
    safe = torch.where(step > 0, step, 1.0)
    codes = ((groups - low[:, :, None]) / safe[:, :, None]).round_().clamp_(0, levels).to(torch.int64)
    planes = torch.stack([(codes >> plane) & 1 for plane in reversed(range(bits))]).bool()
    scales = torch.stack([half * (1 << plane) for plane in reversed(range(bits))])
    return PackedWeight(
        planes=pack_signs(planes.flatten(2)[:, :, :in_features]),
        scales=scales.to(scale_dtype),
        offset=low + half * levels,
        in_features=in_features,
        group_size=group_size,
        sorted=True,
    )
