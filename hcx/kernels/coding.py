"""The door to the native search for codes of weights: alternation in groups, and columns one after another.

`hcx.compress.bcq` and `hcx.compress.feedback` hold the same in torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels.native import SCALE_CODES, check, library, require


class _Columns(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("patterns", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


def alternate(
    groups: Tensor,
    importance: Tensor | None,
    bits: int,
    rounds: int,
    offset: bool,
    scale_dtype: torch.dtype,
    threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating binary codes of groups, each by itself (Xu et al., ICLR 2018, section 3).

    Args:
        groups: finite, `[n, g]`, on the CPU.
        importance: how much a squared error counts, above 0, `[n, g]`; alike if not given.
        bits: planes.
        rounds: of alternation.
        offset: with a constant per group.
        scale_dtype: that the scales are rounded to.
        threads: at most; torch's number if 0. The codes do not depend on it.

    Returns:
        Patterns uint8 `[n, g]` (bit `i` is plane `i`), scales fp32 `[n, bits]`, falling, and offsets fp32 `[n]`.

    Raises:
        KernelError: a setting is out of range.
    """
    count, size = groups.shape
    values = groups.detach().to(torch.float32).contiguous()
    factors = None if importance is None else importance.detach().to(torch.float32).contiguous()
    if factors is not None and factors.shape != values.shape:
        raise KernelError(f"an importance of shape {tuple(factors.shape)} for groups {tuple(values.shape)}")
    patterns = torch.empty(count, size, dtype=torch.uint8)
    scales, offsets = torch.empty(count, bits), torch.empty(count)
    status = library().hcx_bcq_alternate(
        values.data_ptr(),
        None if factors is None else factors.data_ptr(),
        count,
        size,
        bits,
        rounds,
        offset,
        SCALE_CODES[scale_dtype],
        patterns.data_ptr(),
        scales.data_ptr(),
        offsets.data_ptr(),
        threads or torch.get_num_threads(),
    )
    check(status, f"coding groups of {size} in {bits} planes")
    return patterns, scales, offsets


@dataclass(frozen=True)
class Grids:
    """The codes of a matrix in the course of being chosen, on the CPU and contiguous.

    Attributes:
        scales: fp32 `[out, groups, q]`.
        offsets: fp32 `[out, groups]`.
        patterns: uint8 `[out, in]`; changed in place.
        group_size: inputs that share a grid; the last group may be short.
    """

    scales: Tensor
    offsets: Tensor
    patterns: Tensor
    group_size: int

    def columns(self, start: int, stop: int) -> _Columns:
        """A block of columns for the C interface."""
        rows, columns = self.patterns.shape
        groups, bits = -(-columns // self.group_size), self.scales.shape[2]
        require(self.scales, torch.float32, (rows, groups, bits))
        require(self.offsets, torch.float32, (rows, groups))
        require(self.patterns, torch.uint8, (rows, columns))
        pointers = (tensor.data_ptr() for tensor in (self.scales, self.offsets, self.patterns))
        return _Columns(rows, columns, start, stop, self.group_size, *pointers, bits, 0)


def feed_back(grids: Grids, order: Tensor, upper: Tensor, current: Tensor, start: int, stop: int) -> Tensor:
    """Error feedback through a block of columns (GPTQ: Frantar et al., ICLR 2023, section 3).

    Args:
        grids: patterns of the visited columns are written.
        order: int64 `[in]`, where each visited column is stored.
        upper: fp32 `[in, in]`, upper Cholesky factor of the inverse Gram matrix, in the order of visits.
        current: fp32 `[out, in]`, the weights in that order; the block's columns are changed in place.
        start, stop: the block, 64 columns at most.

    Returns:
        fp32 `[out, stop - start]`: errors, to be shared among the columns behind the block.

    Raises:
        KernelError: shapes or types disagree.
    """
    rows, columns = grids.patterns.shape
    require(order, torch.int64, (columns,))
    require(upper, torch.float32, (columns, columns))
    require(current, torch.float32, (rows, columns))
    errors = torch.empty(rows, stop - start)
    block, pointers = grids.columns(start, stop), (tensor.data_ptr() for tensor in (order, upper, current, errors))
    check(library().hcx_bcq_feed_back(ctypes.byref(block), *pointers, torch.get_num_threads()), "error feedback")
    return errors


def choose_codes(grids: Grids, gram: Tensor, pull: Tensor, start: int, stop: int, frozen: int = 0) -> Tensor:
    """Coordinate descent over the codes of a block of columns.

    Args:
        grids: patterns of the block are changed in place.
        gram: fp32 `[in, in]`.
        pull: fp32 `[out, stop - start]`, the block's columns of `(W - W') gram`; changed in place.
        start, stop: the block, 64 columns at most.
        frozen: the first so many planes keep their bits.

    Returns:
        fp32 `[out, stop - start]`: by how much each weight moved.

    Raises:
        KernelError: shapes or types disagree.
    """
    rows, columns = grids.patterns.shape
    require(gram, torch.float32, (columns, columns))
    require(pull, torch.float32, (rows, stop - start))
    deltas = torch.empty(rows, stop - start)
    block, pointers = grids.columns(start, stop), (tensor.data_ptr() for tensor in (gram, pull, deltas))
    check(
        library().hcx_bcq_choose_codes(ctypes.byref(block), *pointers, frozen, torch.get_num_threads()),
        "choosing codes",
    )
    return deltas
