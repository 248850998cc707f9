"""Rotary position embedding (Su et al. 2021), in Hugging Face's rotate-half layout."""

from __future__ import annotations

import torch
from torch import Tensor

from hcx.model.config import ModelConfig

Rotary = tuple[Tensor, Tensor]
"""cos and sin, `[seq, batch or 1, 1, head_dim]`, in the working dtype."""


def rotary_tables(config: ModelConfig, positions: Tensor | None, seq: int, like: Tensor) -> Rotary:
    """cos and sin of the positions, computed in fp32 and cast to the working dtype.

    Args:
        positions: `[batch, seq]` int64; None: `0..seq-1`.
        seq: length of the whole sequence.
        like: a tensor on the device and of the dtype wanted.
    """
    half = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=like.device)
    frequencies = 1.0 / config.rope_theta ** (half / config.head_size)
    if positions is None:
        positions = torch.arange(seq, device=like.device)[None]
    angles = positions.t().float()[:, :, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotates `[seq, batch, heads, head_dim]`."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
