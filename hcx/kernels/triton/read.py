# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of compile-time arguments; the others have none.

"""Reading memory and nothing else: the floor that a product is held against."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _STEPS = 2048, 4
"""Words of a load, and loads of a program: 32 KiB each, many of them in flight."""


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def read_kernel(memory_ptr, out_ptr, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    seen = tl.full((BLOCK,), 0, tl.int32)
    for step in tl.static_range(STEPS):
        where = first + step * BLOCK
        seen = seen | tl.load(memory_ptr + where, mask=where < size, other=0)
    tl.store(out_ptr + tl.program_id(0), tl.reduce(seen, 0, _either))


def read(memory: Tensor) -> Tensor:
    """Reads a contiguous tensor of whole 32-bit words; the result, their union, keeps the reads from being removed."""
    words = memory.view(-1).view(torch.int32)
    programs = triton.cdiv(words.numel(), _BLOCK * _STEPS)
    out = words.new_empty(programs)
    read_kernel[(programs,)](words, out, words.numel(), BLOCK=_BLOCK, STEPS=_STEPS, num_warps=8)
    return out
