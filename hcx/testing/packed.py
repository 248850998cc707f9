"""Random packed weights for kernel tests."""

from __future__ import annotations

import torch

from hcx.kernels import PackedWeight
from hcx.kernels.format import pack_signs


def random_packed(
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    *,
    offset: bool = True,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> PackedWeight:
    """Random planes, normal scales of both signs, normal offsets."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    return PackedWeight(
        pack_signs(torch.rand(bits, out_features, in_features, generator=generator) < 0.5),
        torch.randn(bits, out_features, groups, generator=generator).to(dtype),
        torch.randn(out_features, groups, generator=generator) if offset else None,
        in_features,
        group_size,
    )
