"""The product with a binary-coded weight, expanded in registers, and its dense form.

`y[n, r] = sum_k x[n, k] W[r, k]`, accumulated in fp32 by the matrix units. Weights go from packed words to matrix
operands without touching shared memory; see `expand`. No kernel uses atomics: the sum over the splits of the inputs
is a second pass in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of compile-time arguments; the others have none.

from __future__ import annotations

import triton
import triton.language as tl

from hcx.kernels.triton.expand import (
    activations_in_dot_order,
    group_of_quarter,
    in_dot_order,
    matrix_product,
    narrowed,
    plane_bits,
    rounding_error,
    table,
    weights,
    word_pointers,
)


@triton.jit
def _expanded(
    words,
    plane,
    scales,
    base,
    line,
    KIND: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RUN: tl.constexpr,
):
    low0, low1, high0, high1 = table(scales, base, line, KIND, REST, HALF)
    weight = weights(words, plane, low0[:, :, None], low1[:, :, None], high0[:, :, None], high1[:, :, None], KIND, HALF)
    return in_dot_order(weight, ROWS, WORDS, RUN)


@triton.jit
def _accumulate(
    total,
    x,
    words,
    plane,
    scales,
    base,
    line,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    RUN: tl.constexpr,
):
    weight = _expanded(words, plane, scales, base, line, KIND, False, HALF, ROWS, WORDS, RUN)
    total = matrix_product(weight, x, total)
    if EXACT:
        rest = _expanded(words, plane, scales, base, line, KIND, True, HALF, ROWS, WORDS, RUN)
        total = matrix_product(rest, x, total)
    return total


@triton.jit
def product_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    offset_ptr,
    out_ptr,
    num_columns,
    out_features,
    in_features,
    x_stride,
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
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    RUN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of `y`, or its part from `TILES` tiles of the inputs.

    Args:
        x_ptr: `[num_columns, in_features]`, rows `x_stride` apart.
        codes_ptr, scales_ptr, offset_ptr: a `layout.GpuWeight`.
        out_ptr: `[splits, num_columns, out_features]`; splits = the grid's third dimension.
        KIND, SECOND_KIND: planes of the parts (`layout.PARTS`), 0 for none.
        GROUP: inputs per scale, a multiple of `32 * WORDS`.
        EXACT: levels are a sum of two 16-bit numbers instead of one.
        HALF: `x` and the levels are fp16, else bf16.
        ROWS, COLUMNS: of the block.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    INPUTS: tl.constexpr = 128 * WORDS
    inside = tl.arange(0, INPUTS)
    x_rows = x_ptr + columns[:, None].to(tl.int64) * x_stride
    plane = 64 * WORDS
    # A kind-4 table cannot hold an offset: its levels come in pairs of opposite sign.
    NARROW: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    FOLDED: tl.constexpr = HAS_OFFSET and KIND != 4
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for step in tl.range(0, TILES, num_stages=STAGES):
        tile = split * TILES + step
        inputs = tile * INPUTS + inside
        # The last split may run past the end: it then meets zero activations, and must only not read past the weights.
        tile = tl.minimum(tile, num_tiles - 1)
        x = tl.load(
            x_rows + inputs[None, :],
            mask=(columns < num_columns)[:, None] & (inputs < in_features)[None, :],
            other=0.0,
        )
        x = tl.trans(activations_in_dot_order(x, COLUMNS, WORDS, RUN))
        group = group_of_quarter(tile, num_groups, GROUP, WORDS)
        words = word_pointers(codes_ptr, rows, tile, num_tiles, BITS, ROWS, WORDS)
        scales = scales_ptr + (group[None, :] * BITS) * padded_rows + rows[:, None]
        base = tl.full((ROWS, 4), 0.0, tl.float32)
        if FOLDED:
            base = tl.load(offset_ptr + group[None, :] * padded_rows + rows[:, None])
        total = _accumulate(total, x, words, plane, scales, base, padded_rows, KIND, EXACT, HALF, ROWS, WORDS, RUN)
        if SECOND_KIND > 0:
            words = words + KIND * plane
            scales = scales + KIND * padded_rows
            base = tl.full((ROWS, 4), 0.0, tl.float32)
            if HAS_OFFSET and KIND == 4 and SECOND_KIND != 4:
                base = tl.load(offset_ptr + group[None, :] * padded_rows + rows[:, None])
            total = _accumulate(
                total, x, words, plane, scales, base, padded_rows,
                SECOND_KIND, EXACT, HALF, ROWS, WORDS, RUN,
            )  # fmt: skip
        if HAS_OFFSET and KIND == 4 and (SECOND_KIND == 0 or SECOND_KIND == 4):
            value = tl.load(offset_ptr + group[None, :] * padded_rows + rows[:, None])
            total = matrix_product(_constant(value, HALF, ROWS, WORDS, RUN), x, total)
            if EXACT:
                total = matrix_product(_constant(rounding_error(value, NARROW), HALF, ROWS, WORDS, RUN), x, total)
    out = out_ptr + (split.to(tl.int64) * num_columns + columns[None, :]) * out_features + rows[:, None]
    tl.store(
        out,
        narrowed(total, out_ptr.dtype.element_ty),
        mask=(rows < out_features)[:, None] & (columns < num_columns)[None, :],
    )


@triton.jit
def _constant(value, HALF: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, RUN: tl.constexpr):
    """A number per (row, quarter) as the weights of the whole quarter."""
    rounded = narrowed(value, tl.float16 if HALF else tl.bfloat16)
    spread = tl.broadcast_to(rounded[:, :, None, None, None, None, None, None], (ROWS, 4, WORDS, 2, 2, 2, 2, 2))
    return in_dot_order(spread, ROWS, WORDS, RUN)


@triton.jit
def sum_kernel(partial_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """`out[i] = sum_s partial[s, i]` in fp32 in the order of `s`."""
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for split in tl.static_range(SPLITS):
        first = tl.full((BLOCK,), split, tl.int64) * size
        total += tl.load(partial_ptr + first + where, mask=where < size, other=0.0)
    tl.store(out_ptr + where, narrowed(total, out_ptr.dtype.element_ty), mask=where < size)


@triton.jit
def signed_sum(words, plane, scales, line, total, FIRST: tl.constexpr, KIND: tl.constexpr):
    """Adds a part's planes to fp32 `total` `[rows, 4, words, 32]`, coarsest first, as `PackedWeight.dequantize`
    does."""
    for index in tl.static_range(KIND):
        scale = tl.load(scales + (FIRST + index) * line).to(tl.float32)
        sign = (2 * plane_bits(words + FIRST * plane, plane, KIND, index) - 1).to(tl.float32)
        total = total + scale[:, :, None, None] * sign
    return total


@triton.jit
def levels(
    codes_ptr,
    scales_ptr,
    offset_ptr,
    rows,
    tile,
    num_tiles,
    num_groups,
    padded_rows,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SECOND_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile's weights in fp32, `[rows, 128 * words]` in the order of the inputs, as `PackedWeight.dequantize` sums
    them."""
    group = group_of_quarter(tile, num_groups, GROUP, WORDS)
    words = word_pointers(codes_ptr, rows, tile, num_tiles, BITS, ROWS, WORDS)[:, :, :, None]
    scales = scales_ptr + (group[None, :] * BITS) * padded_rows + rows[:, None]
    total = tl.full((ROWS, 4, WORDS, 32), 0.0, tl.float32)
    total = signed_sum(words, 64 * WORDS, scales, padded_rows, total, 0, KIND)
    if SECOND_KIND > 0:
        total = signed_sum(words, 64 * WORDS, scales, padded_rows, total, KIND, SECOND_KIND)
    if HAS_OFFSET:
        total = total + tl.load(offset_ptr + group[None, :] * padded_rows + rows[:, None])[:, :, None, None]
    return tl.reshape(total, (ROWS, 128 * WORDS))


@triton.jit
def dequantize_kernel(
    codes_ptr,
    scales_ptr,
    offset_ptr,
    out_ptr,
    first_row,
    out_rows,
    in_features,
    num_tiles,
    num_groups,
    padded_rows,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SECOND_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows `first_row` and following as a dense `[out_rows, in_features]`; grid (row blocks, tiles)."""
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    dense = levels(
        codes_ptr, scales_ptr, offset_ptr, first_row + local, tile, num_tiles, num_groups, padded_rows,
        BITS, KIND, SECOND_KIND, GROUP, WORDS, HAS_OFFSET, ROWS,
    )  # fmt: skip
    inputs = tile * (128 * WORDS) + tl.arange(0, 128 * WORDS)
    tl.store(
        out_ptr + local[:, None].to(tl.int64) * in_features + inputs[None, :],
        narrowed(dense, out_ptr.dtype.element_ty),
        mask=(local < out_rows)[:, None] & (inputs < in_features)[None, :],
    )
