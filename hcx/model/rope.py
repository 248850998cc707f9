"""Rotary position embedding (Su et al. 2021), in Hugging Face's rotate-half layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    if torch.compiler.is_compiling():
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin
    result: Tensor = _Rotate.apply(x, cos, sin)
    return result


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing of the activations is kept, and no half is copied twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    half = x.shape[-1] // 2
    # Both halves of the tables are equal: the angle belongs to a pair.
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = x[..., :half], x[..., half:]
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    low, high = result[..., :half], result[..., half:]
    torch.mul(first, cos, out=low)
    low.addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=high)
    high.addcmul_(first, sin, value=direction)
    return result
