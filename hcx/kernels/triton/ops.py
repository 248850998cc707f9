"""The kernels as torch operators, with shapes for tracing and gradients.

Nothing else of hcx needs to know that Triton is behind them; `torch.compile` sees one opaque operator each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hcx.kernels.triton import launch
from hcx.kernels.triton.layout import ROW_BLOCK


@torch.library.custom_op("hcx::gpu_product", mutates_args=())
def gpu_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offset: Tensor | None,
    out_features: int,
    group_size: int,
    exact: bool,
) -> Tensor:
    """`x W^T` for a `layout.GpuWeight`: `[columns, in] -> [columns, out]` in the dtype of `x`.

    Batches above `launch.dequantize_above` columns go through a dense copy in the dtype of `x` (fp32 if `exact`) and
    the library's matrix product. Differentiable in `x`, `scales` and `offset`.
    """
    if x.shape[0] > launch.dequantize_above(x.device):
        return _through_dense(x, codes, scales, offset, out_features, x.shape[1], group_size, exact, transposed=True)
    return launch.product(x, codes, scales, offset, out_features, group_size, exact)


@gpu_product.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor, offset: Tensor | None, out_features: int, group_size: int, exact: bool
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("hcx::gpu_input_gradient", mutates_args=())
def gpu_input_gradient(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    exact: bool,
) -> Tensor:
    """`dy W`: `[columns, out] -> [columns, in]` in the dtype of `dy`; large batches as in `gpu_product`."""
    if grad.shape[0] > launch.dequantize_above(grad.device):
        return _through_dense(
            grad, codes, scales, offset, grad.shape[1], in_features, group_size, exact, transposed=False
        )
    return launch.input_gradient(grad, codes, scales, offset, in_features, group_size, exact)


@gpu_input_gradient.register_fake
def _(
    grad: Tensor, codes: Tensor, scales: Tensor, offset: Tensor | None, in_features: int, group_size: int, exact: bool
) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


@torch.library.custom_op("hcx::gpu_scale_gradient", mutates_args=())
def gpu_scale_gradient(
    grad: Tensor, x: Tensor, codes: Tensor, scales: Tensor, group_size: int, has_offset: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of scales `[groups, q, rows]` and offset `[groups, rows]` (`[0]` without one), both in fp32."""
    return launch.scale_gradient(grad, x, codes, scales, group_size, has_offset)


@gpu_scale_gradient.register_fake
def _(
    grad: Tensor, x: Tensor, codes: Tensor, scales: Tensor, group_size: int, has_offset: bool
) -> tuple[Tensor, Tensor]:
    groups, bits, rows = scales.shape
    offset_shape = (groups, rows) if has_offset else (0,)
    return (
        scales.new_empty(groups, bits, rows, dtype=torch.float32),
        scales.new_empty(offset_shape, dtype=torch.float32),
    )


@torch.library.custom_op("hcx::gpu_dequantize", mutates_args=())
def gpu_dequantize(
    codes: Tensor,
    scales: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
    first_row: int,
    num_rows: int,
) -> Tensor:
    """Rows `first_row` and following of the dense weight, `[num_rows, in]`."""
    return launch.dequantize(codes, scales, offset, in_features, group_size, dtype, first_row, num_rows)


@gpu_dequantize.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
    first_row: int,
    num_rows: int,
) -> Tensor:
    return codes.new_empty(num_rows, in_features, dtype=dtype)


def _through_dense(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    exact: bool,
    transposed: bool,
) -> Tensor:
    dtype = torch.float32 if exact else x.dtype
    wide = x.to(dtype)
    step = launch.DENSE_BYTES // (in_features * wide.element_size()) // ROW_BLOCK * ROW_BLOCK
    step = min(max(step, ROW_BLOCK), out_features)
    out = None if transposed else x.new_zeros(x.shape[0], in_features, dtype=dtype)
    pieces = []
    for first in range(0, out_features, step):
        rows = min(step, out_features - first)
        dense = launch.dequantize(codes, scales, offset, in_features, group_size, dtype, first, rows)
        if out is None:
            pieces.append(wide @ dense.t())
        else:
            out.addmm_(wide[:, first : first + rows], dense)
    result = torch.cat(pieces, dim=1) if out is None else out
    return result.to(x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, offset, _, group_size, exact = inputs
    # The input is kept only for the gradients of scales and offset.
    needs_x = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x if needs_x else None, codes, scales, offset)
    ctx.in_features, ctx.group_size, ctx.exact = x.shape[1], group_size, exact


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, scales, offset = ctx.saved_tensors
    grad_x = grad_scales = grad_offset = None
    if ctx.needs_input_grad[0]:
        grad_x = gpu_input_gradient(grad, codes, scales, offset, ctx.in_features, ctx.group_size, ctx.exact)
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        grad_scales, found = gpu_scale_gradient(grad, x, codes, scales, ctx.group_size, offset is not None)
        grad_scales = grad_scales.to(scales.dtype)
        grad_offset = found if offset is not None else None
    return grad_x, None, grad_scales, grad_offset, None, None, None


gpu_product.register_autograd(_backward, setup_context=_setup_context)
