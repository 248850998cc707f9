"""Launching the kernels: tile shapes, splits, and the second passes. Everything is decided from shapes and the device.

So nothing waits for the GPU, memory comes from torch's caching allocator only, and a call can be captured in a CUDA
graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels.triton import backward, forward
from hcx.kernels.triton.expand import INTERPRETED
from hcx.kernels.triton.layout import PARTS, ROWS, num_tiles, words_per_group


@dataclass(frozen=True)
class Tile:
    """The shape of one block of the product.

    Attributes:
        columns: batch columns of a block; the smallest tile that holds the batch is taken, or the largest repeatedly.
        stages: depth of the software pipeline over tiles of inputs.
        run: neighbouring columns of a thread in the matrix instruction's fragment, see `expand.in_dot_order`.
        warps: of a block.
    """

    columns: int
    stages: int
    run: int
    warps: int = 4


TILES: dict[int, tuple[Tile, ...]] = {
    8: (Tile(8, 3, 4), Tile(16, 3, 4), Tile(32, 3, 4)),
    9: (Tile(8, 3, 4), Tile(16, 3, 2), Tile(32, 2, 2), Tile(64, 2, 2)),
}
"""By major compute capability; later ones take Hopper's. Chosen from register and shared-memory reports of the
compiler, not from timings: no GPU was at hand (docs/gpu-kernels.md)."""

DEQUANTIZE_ABOVE: dict[int, int] = {8: 64, 9: 256}
"""By major compute capability: batches above this many columns dequantize and call
cuBLAS. Estimated from traffic, never measured; `HCX_DEQUANTIZE_ABOVE` overrides it."""

PROGRAMS_PER_SM = 4
"""Blocks that a launch aims for, for each multiprocessor: as many as 128 registers a thread leave room for; with
three stages each they keep 100 KB of loads in flight."""

DENSE_BYTES = 256 << 20
"""The dense copy of a weight is made in pieces of at most this size."""

_P = ParamSpec("_P")
_R = TypeVar("_R")
_REDUCE_BLOCK = 1024
_INTERPRETED_SMS = 1


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return bool(INTERPRETED.value)


def capability(device: torch.device) -> int:
    """Major compute capability; Hopper's in the interpreter."""
    return 9 if device.type != "cuda" else torch.cuda.get_device_capability(device)[0]


def tile_for(columns: int, major: int) -> Tile:
    """The tile for a batch."""
    tiles = TILES[8] if major <= 8 else TILES[9]
    return next((tile for tile in tiles if columns <= tile.columns), tiles[-1])


def splits_for(blocks: int, steps: int, device: torch.device) -> int:
    """In how many parts the sum over `steps` is taken, so that `blocks` fill the device.

    It does not depend on the batch: a row of a batch is summed in the order in which it would be alone.
    """
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _INTERPRETED_SMS
    return max(1, min(steps, PROGRAMS_PER_SM * sms // blocks))


def dequantize_above(device: torch.device) -> int:
    """Columns above which a product dequantizes first.

    Raises:
        KernelError: `HCX_DEQUANTIZE_ABOVE` is no number.
    """
    override = os.environ.get("HCX_DEQUANTIZE_ABOVE")
    if override is None:
        return DEQUANTIZE_ABOVE[8] if capability(device) <= 8 else DEQUANTIZE_ABOVE[9]
    if not override.isdecimal():
        raise KernelError(f"HCX_DEQUANTIZE_ABOVE = {override!r}; it takes a number of batch columns, such as 256")
    return int(override)


@dataclass(frozen=True)
class _Geometry:
    bits: int
    kinds: tuple[int, int]
    words: int
    tiles: int
    groups: int
    rows: int
    group: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, offset: Tensor | None, in_features: int, group_size: int) -> _Geometry:
        words = words_per_group(group_size, in_features)
        parts = PARTS[codes.shape[2]]
        tiles = num_tiles(in_features, words)
        expected = (scales.shape[2] // 16, tiles, scales.shape[1], 16, 4 * words)
        if tuple(codes.shape) != expected or scales.shape[2] % ROWS:
            raise KernelError(
                f"codes are {tuple(codes.shape)}; {in_features} inputs in groups of {group_size} need {expected}"
            )
        groups = -(-in_features // group_size)
        if scales.shape[0] != groups or (offset is not None and tuple(offset.shape) != (groups, scales.shape[2])):
            shapes = f"{tuple(scales.shape)} and {None if offset is None else tuple(offset.shape)}"
            raise KernelError(
                f"scales and offset are {shapes}; {in_features} inputs need {groups} groups of {group_size}"
            )
        return cls(
            bits=codes.shape[2],
            kinds=(parts[0], parts[1] if len(parts) > 1 else 0),
            words=words,
            tiles=tiles,
            groups=scales.shape[0],
            rows=scales.shape[2],
            # One group for the whole row: any multiple of the tile that covers it.
            group=tiles * 128 * words if group_size >= in_features else group_size,
        )


def _on_its_device(launch: Callable[_P, _R]) -> Callable[_P, _R]:
    """Triton launches on the current device, which need not be the tensors'."""

    @wraps(launch)
    def launched(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return launch(*args, **kwargs)

    return launched


@_on_its_device
def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offset: Tensor | None,
    out_features: int,
    group_size: int,
    exact: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x W^T` for `x` `[columns, in]` in fp16, bf16 or fp32, in its dtype.

    Args:
        exact: levels are a sum of two 16-bit numbers instead of one; always so for fp32.
    """
    if x.dtype == torch.float32:
        halves = product(_two_bf16(x), codes, scales, offset, out_features, group_size, True, out_dtype=torch.float32)
        return halves[: x.shape[0]] + halves[x.shape[0] :]
    columns, in_features = x.shape
    shape = _Geometry.of(codes, scales, offset, in_features, group_size)
    out = x.new_empty(columns, out_features, dtype=out_dtype or x.dtype)
    if columns == 0:
        return out
    x = _rows_contiguous(x)
    tile = tile_for(columns, capability(x.device))
    blocks = shape.rows // ROWS
    tiles = -(-shape.tiles // splits_for(blocks, shape.tiles, x.device))
    splits = -(-shape.tiles // tiles)
    target = out if splits == 1 else x.new_empty(splits, columns, out_features, dtype=torch.float32)
    forward.product_kernel[(blocks, -(-columns // tile.columns), splits)](
        x, codes, scales, codes if offset is None else offset, target,
        columns, out_features, in_features, x.stride(0), shape.tiles, shape.groups, shape.rows,
        BITS=shape.bits, KIND=shape.kinds[0], SECOND_KIND=shape.kinds[1], GROUP=shape.group, WORDS=shape.words,
        HAS_OFFSET=offset is not None, EXACT=exact, HALF=x.dtype == torch.float16,
        ROWS=ROWS, COLUMNS=tile.columns, TILES=tiles, RUN=tile.run, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return _summed(target, out)


@_on_its_device
def dequantize(
    codes: Tensor,
    scales: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
    first_row: int,
    num_rows: int,
) -> Tensor:
    """Rows of the dense weight, `[num_rows, in]`: bit for bit `PackedWeight.dequantize`'s."""
    shape = _Geometry.of(codes, scales, offset, in_features, group_size)
    out = codes.new_empty(num_rows, in_features, dtype=dtype)
    block = 16
    forward.dequantize_kernel[(-(-num_rows // block), shape.tiles)](
        codes, scales, codes if offset is None else offset, out,
        first_row, num_rows, in_features, shape.tiles, shape.groups, shape.rows,
        BITS=shape.bits, KIND=shape.kinds[0], SECOND_KIND=shape.kinds[1], GROUP=shape.group, WORDS=shape.words,
        HAS_OFFSET=offset is not None, ROWS=block, num_warps=4,
    )  # fmt: skip
    return out


@_on_its_device
def input_gradient(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    exact: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`dy W` for `dy` `[columns, out]` in fp16, bf16 or fp32, in its dtype; `exact` as in `product`."""
    if grad.dtype == torch.float32:
        halves = input_gradient(
            _two_bf16(grad), codes, scales, offset, in_features, group_size, True, out_dtype=torch.float32
        )
        return halves[: grad.shape[0]] + halves[grad.shape[0] :]
    columns, out_features = grad.shape
    shape = _Geometry.of(codes, scales, offset, in_features, group_size)
    out = grad.new_empty(columns, in_features, dtype=out_dtype or grad.dtype)
    if columns == 0:
        return out
    grad = _rows_contiguous(grad)
    block, width = 16, 16
    steps = shape.rows // block
    blocks = -(-steps // splits_for(shape.tiles, steps, grad.device))
    splits = -(-steps // blocks)
    target = out if splits == 1 else grad.new_empty(splits, columns, in_features, dtype=torch.float32)
    backward.input_gradient_kernel[(shape.tiles, -(-columns // width), splits)](
        grad, codes, scales, codes if offset is None else offset, target,
        columns, out_features, in_features, grad.stride(0), shape.tiles, shape.groups, shape.rows,
        BITS=shape.bits, KIND=shape.kinds[0], SECOND_KIND=shape.kinds[1], GROUP=shape.group, WORDS=shape.words,
        HAS_OFFSET=offset is not None, EXACT=exact, ROWS=block, COLUMNS=width, BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    return _summed(target, out)


@_on_its_device
def scale_gradient(
    grad: Tensor, x: Tensor, codes: Tensor, scales: Tensor, group_size: int, has_offset: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of scales `[groups, q, rows]` and offset `[groups, rows]` in fp32; the latter is empty without an
    offset."""
    if x.dtype == torch.float32:
        # All four products of the halves, as more columns of the sum over the batch.
        (grad_high, grad_low), (high, low) = (_two_bf16(t).chunk(2) for t in (grad, x))
        grad = torch.cat([grad_high, grad_high, grad_low, grad_low])
        x = torch.cat([high, low, high, low])
    columns, in_features = x.shape
    shape = _Geometry.of(codes, scales, None, in_features, group_size)
    lines = shape.bits + has_offset
    grad, x = _rows_contiguous(grad), _rows_contiguous(x)
    partial = x.new_empty(4 * shape.tiles, lines, shape.rows, dtype=torch.float32)
    block = 16
    backward.scale_gradient_kernel[(shape.rows // block, shape.tiles)](
        grad, x, codes, partial,
        columns, grad.shape[1], in_features, grad.stride(0), x.stride(0), shape.tiles, shape.rows,
        BITS=shape.bits, KIND=shape.kinds[0], SECOND_KIND=shape.kinds[1], WORDS=shape.words, HAS_OFFSET=has_offset,
        ROWS=block, COLUMNS=16, STEPS=_bucket(-(-columns // 16)), num_warps=4,
    )  # fmt: skip
    # Quarters past the last group met no inputs: their sums are zero, and there may be too few of them.
    quarters = shape.group // (32 * shape.words)
    needed = quarters * shape.groups
    partial = torch.nn.functional.pad(partial, (0, 0, 0, 0, 0, max(0, needed - partial.shape[0])))[:needed]
    summed = partial.unflatten(0, (shape.groups, quarters)).sum(1)
    offset_gradient = summed[:, shape.bits].clone() if has_offset else summed.new_empty(0)
    return summed[:, : shape.bits].clone(memory_format=torch.contiguous_format), offset_gradient


def _bucket(steps: int) -> int:
    """The count rounded up to three significant bits: loop lengths are compiled in, and batches of text vary."""
    unit = 1 << max(0, steps.bit_length() - 3)
    return -(-steps // unit) * unit


def _two_bf16(x: Tensor) -> Tensor:
    """fp32 `[columns, ...]` as two bf16 numbers that sum to it to 16 bits, below each other: `[2 columns, ...]`."""
    high = x.bfloat16()
    return torch.cat([high, (x - high).bfloat16()])


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _summed(partial: Tensor, out: Tensor) -> Tensor:
    """Sums the splits into `out`, unless there was only one and it is `out` already."""
    if partial is not out:
        size = out.numel()
        forward.sum_kernel[(triton.cdiv(size, _REDUCE_BLOCK),)](
            partial, out, size, SPLITS=partial.shape[0], BLOCK=_REDUCE_BLOCK
        )
    return out
