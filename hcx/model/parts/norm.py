"""RMSNorm (Zhang and Sennrich 2019) with statistics in fp32.

On a GPU torch has a fused kernel. On a CPU its composite costs about twenty passes over the activations in forward and
backward; the formula below needs half of them and keeps only the input and one number per token for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in the dtype of `x`."""
    if x.is_cuda or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        size = x.shape[-1]
        squares = wide.square().sum(-1, keepdim=True)
        inverse = squares.div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normal = x.float() * inverse
        wide = gradient.float()
        for_weight = for_x = None
        if ctx.needs_input_grad[1]:
            for_weight = (wide * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scaled = wide * weight.float()
            along = torch.linalg.vecdot(scaled, normal).unsqueeze_(-1).div_(x.shape[-1])
            for_x = torch.addcmul(scaled, normal, along, value=-1.0).mul_(inverse).to(x.dtype)
        return for_x, for_weight, None
