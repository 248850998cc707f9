"""Gradients of the product for training on frozen planes: with respect to the input, the scales and the offset.

With `y = x W^T` and `W[r, k] = sum_i scales[i, r, G] sign_i[r, k] + offset[r, G]`, `G = k // g` (AlphaTuning, Kwon et
al. 2022, section 3):

    dx[n, k]             = sum_r dy[n, r] W[r, k]
    dscales[i, r, G]     = sum over k in G of D[r, k] sign_i[r, k],   D[r, k] = sum_n dy[n, r] x[n, k] in fp32
    doffset[r, G]        = sum over k in G of D[r, k]

`D` lives in registers only. The sums over rows (`dx`) and over the parts of a group are second passes in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of compile-time arguments; the others have none.

from __future__ import annotations

import triton
import triton.language as tl

from hcx.kernels.triton.expand import matrix_product, narrowed, plane_bits, rounding_error, word_pointers
from hcx.kernels.triton.forward import levels


@triton.jit
def input_gradient_kernel(
    grad_ptr,
    codes_ptr,
    scales_ptr,
    offset_ptr,
    out_ptr,
    num_columns,
    out_features,
    in_features,
    grad_stride,
    num_tiles,
    num_groups,
    padded_rows,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SECOND_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`dx` of one tile of inputs, or its part from `BLOCKS` blocks of rows; grid (tiles, column blocks, splits).

    Args:
        grad_ptr: `dy` `[num_columns, out_features]` in 16 bits, rows `grad_stride` apart.
        out_ptr: `[splits, num_columns, in_features]`.
        EXACT: levels are a sum of two numbers of the gradients' dtype instead of one.
    """
    tile = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    inputs = tile * (128 * WORDS) + tl.arange(0, 128 * WORDS)
    total = tl.full((COLUMNS, 128 * WORDS), 0.0, tl.float32)
    for step in tl.range(0, BLOCKS):
        rows = (split * BLOCKS + step) * ROWS + tl.arange(0, ROWS)
        grad = tl.load(
            grad_ptr + columns[:, None].to(tl.int64) * grad_stride + rows[None, :],
            mask=(columns < num_columns)[:, None] & (rows < out_features)[None, :],
            other=0.0,
        )
        # The last split may run past the end: the gradients above are zero there.
        rows = tl.minimum(rows, padded_rows - 1)
        weight = levels(
            codes_ptr, scales_ptr, offset_ptr, rows, tile, num_tiles, num_groups, padded_rows,
            BITS, KIND, SECOND_KIND, GROUP, WORDS, HAS_OFFSET, ROWS,
        )  # fmt: skip
        total = matrix_product(grad, narrowed(weight, grad.dtype), total)
        if EXACT:
            total = matrix_product(grad, narrowed(rounding_error(weight, grad.dtype), grad.dtype), total)
    tl.store(
        out_ptr + (split.to(tl.int64) * num_columns + columns[:, None]) * in_features + inputs[None, :],
        narrowed(total, out_ptr.dtype.element_ty),
        mask=(columns < num_columns)[:, None] & (inputs < in_features)[None, :],
    )


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _store_quarters(value, out_ptr, index, tile, rows, padded_rows, LINES: tl.constexpr):
    # [rows, 4, words] -> [rows, 4]: the words of a quarter share a group
    quarter = tile * 4 + tl.arange(0, 4)
    tl.store(
        out_ptr + (quarter[None, :] * LINES + index).to(tl.int64) * padded_rows + rows[:, None],
        tl.reduce(value, 2, _add),
    )


@triton.jit
def _store_planes(
    product,
    words,
    plane,
    out_ptr,
    tile,
    rows,
    padded_rows,
    FIRST: tl.constexpr,
    KIND: tl.constexpr,
    LINES: tl.constexpr,
):
    for index in tl.static_range(KIND):
        sign = (2 * plane_bits(words + FIRST * plane, plane, KIND, index) - 1).to(tl.float32)
        _store_quarters(tl.reduce(product * sign, 3, _add), out_ptr, FIRST + index, tile, rows, padded_rows, LINES)


@triton.jit
def scale_gradient_kernel(
    grad_ptr,
    x_ptr,
    codes_ptr,
    out_ptr,
    num_columns,
    out_features,
    in_features,
    grad_stride,
    x_stride,
    num_tiles,
    padded_rows,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SECOND_KIND: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Gradients of scales and offset, summed over the quarter of a tile; grid (row blocks, tiles).

    Args:
        out_ptr: fp32 `[4 * tiles, bits (+ 1 with an offset), padded rows]`, the offset's gradient last.
        STEPS: blocks of `COLUMNS` columns that cover the batch, or more.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    inputs = tile * (128 * WORDS) + tl.arange(0, 128 * WORDS)
    LINES: tl.constexpr = BITS + 1 if HAS_OFFSET else BITS
    product = tl.full((ROWS, 128 * WORDS), 0.0, tl.float32)
    for step in tl.range(0, STEPS):
        columns = step * COLUMNS + tl.arange(0, COLUMNS)
        grad = tl.load(
            grad_ptr + columns[None, :].to(tl.int64) * grad_stride + rows[:, None],
            mask=(rows < out_features)[:, None] & (columns < num_columns)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + columns[:, None].to(tl.int64) * x_stride + inputs[None, :],
            mask=(columns < num_columns)[:, None] & (inputs < in_features)[None, :],
            other=0.0,
        )
        product = matrix_product(grad, x, product)
    words = word_pointers(codes_ptr, rows, tile, num_tiles, BITS, ROWS, WORDS)[:, :, :, None]
    product = tl.reshape(product, (ROWS, 4, WORDS, 32))
    _store_planes(product, words, 64 * WORDS, out_ptr, tile, rows, padded_rows, 0, KIND, LINES)
    if SECOND_KIND > 0:
        _store_planes(product, words, 64 * WORDS, out_ptr, tile, rows, padded_rows, KIND, SECOND_KIND, LINES)
    if HAS_OFFSET:
        _store_quarters(tl.reduce(product, 3, _add), out_ptr, BITS, tile, rows, padded_rows, LINES)
