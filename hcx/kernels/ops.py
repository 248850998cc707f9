"""The native product as torch operators: traceable (fake kernels) and differentiable.

`hcx::bcq_matmul` is linear in its input; the weights are frozen data to it. Gradients of scales, for training that
tunes them (AlphaTuning, Kwon et al. 2022), are those of `scaled_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hcx.errors import KernelError
from hcx.kernels import native
from hcx.kernels.format import PackedWeight


@torch.library.custom_op("hcx::bcq_matmul", mutates_args=(), device_types="cpu")
def bcq_matmul(x: Tensor, weights: list[Tensor], out_features: list[int], method: str) -> Tensor:
    """`x W^T` for native weights that share an input, outputs concatenated: `[..., in] -> [..., sum(out)]`."""
    return native.matmul(x, native.handle_of(weights), sum(out_features), x.shape[-1], method)


@bcq_matmul.register_fake
def _(x: Tensor, weights: list[Tensor], out_features: list[int], method: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(out_features))


@torch.library.custom_op("hcx::bcq_dequantize", mutates_args=(), device_types="cpu")
def bcq_dequantize(weight: Tensor, out_features: int, in_features: int) -> Tensor:
    """The dense weight `[out, in]` fp32 of a native weight."""
    return native.dequantize(weight, out_features, in_features)


@bcq_dequantize.register_fake
def _(weight: Tensor, out_features: int, in_features: int) -> Tensor:
    return weight.new_empty(out_features, in_features, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, ctx.out_features, _ = inputs
    ctx.save_for_backward(*weights)
    ctx.in_features, ctx.dtype = x.shape[-1], x.dtype


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, list[None], None, None]:
    # dX = dY W, one dense matrix at a time.
    total = None
    parts = gradient.float().split(ctx.out_features, dim=-1)
    for part, weight, rows in zip(parts, ctx.saved_tensors, ctx.out_features, strict=True):
        term = part @ torch.ops.hcx.bcq_dequantize(weight, rows, ctx.in_features)
        total = term if total is None else total + term
    for_x = None if total is None else total.to(ctx.dtype)
    return for_x, [None] * len(ctx.saved_tensors), None, None


bcq_matmul.register_autograd(_input_gradient, setup_context=_keep)


def matmul(x: Tensor, weights: Sequence[native.NativeWeight], method: str) -> Tensor:
    """The product by the shortest way: the operator where a graph is built or traced, the C function elsewhere."""
    first, out_features = weights[0], [weight.out_features for weight in weights]
    if (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
        result: Tensor = torch.ops.hcx.bcq_matmul(x, [weight.data for weight in weights], out_features, method)
        return result
    handle = first.handle if len(weights) == 1 else first.group_handle(weights[1:])
    return native.matmul(x, handle, sum(out_features), first.in_features, method)


def dequantize(weight: native.NativeWeight) -> Tensor:
    """The dense weight `[out, in]` fp32, by the shortest way as well."""
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.hcx.bcq_dequantize(weight.data, weight.out_features, weight.in_features)
        return result
    return native.dequantize(weight.data, weight.out_features, weight.in_features)


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, offset: Tensor | None, weight: PackedWeight, data: Tensor, method: str
    ) -> Tensor:
        native.set_scales(data, scales.to(weight.scales.dtype), offset)
        ctx.save_for_backward(x, scales, offset)
        ctx.weight = weight
        return native.matmul(x, native.handle_of([data]), weight.out_features, weight.in_features, method)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, scales, offset = ctx.saved_tensors
        weight: PackedWeight = ctx.weight
        group, groups = weight.group_size, weight.num_groups
        pad = groups * group - weight.in_features
        wide = gradient.float().flatten(0, -2)
        for_x = for_scales = for_offset = None
        outer = torch.nn.functional.pad(wide.t() @ x.float().flatten(0, -2), (0, pad)).unflatten(1, (groups, group))
        if ctx.needs_input_grad[1]:
            # y = sum_i scale_i (B_i x): the gradient of a scale is dY^T X against the signs of its group.
            grouped = torch.nn.functional.pad(weight.signs(), (0, pad)).unflatten(2, (groups, group))
            for_scales = torch.stack([(plane * outer).sum(-1) for plane in grouped]).to(scales.dtype)
        if offset is not None and ctx.needs_input_grad[2]:
            for_offset = outer.sum(-1)
        if ctx.needs_input_grad[0]:
            used = replace(weight, scales=scales.to(weight.scales.dtype), offset=offset)
            for_x = (wide @ used.dequantize()).view(x.shape).to(x.dtype)
        return for_x, for_scales, for_offset, None, None, None


def scaled_linear(
    x: Tensor,
    weight: PackedWeight,
    packed: native.NativeWeight,
    scales: Tensor,
    offset: Tensor | None = None,
    numerics: str = "exact",
) -> Tensor:
    """`x W^T` with frozen planes and scales (and offsets) that may want gradients; forward by the native kernel.

    Args:
        x: `[..., in]`.
        weight: the planes, and the dtype that scales are multiplied in.
        packed: the same weight in machine layout; its scales are overwritten.
        scales: `[q, out, groups]`, floating point.
        offset: fp32 `[out, groups]`; as the weight has them, or none.
        numerics: `exact` or `fast`.

    Raises:
        KernelError: shapes disagree.
    """
    if scales.shape != weight.scales.shape or (offset is None) != (weight.offset is None):
        raise KernelError(
            f"scales {tuple(scales.shape)}, offset {'none' if offset is None else tuple(offset.shape)}: "
            f"the weight has scales {tuple(weight.scales.shape)}"
            f"{'' if weight.offset is None else ' and an offset'}"
        )
    method = "tables15" if numerics == "exact" else "fast"
    result: Tensor = _ScaledLinear.apply(x, scales, offset, weight, packed.data, method)
    return result
