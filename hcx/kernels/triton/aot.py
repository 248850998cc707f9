"""Compiling the kernels ahead of time, without a GPU, and reading what became of them.

A speed claim that cannot be measured here can at least be counted: how many machine instructions one weight costs in
the inner loop, whether registers spill, and whether bytes are permuted rather than extracted. Not in the interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hcx.errors import KernelError
from hcx.kernels.triton import backward, forward
from hcx.kernels.triton.launch import Tile, interpreted
from hcx.kernels.triton.layout import PARTS, ROWS

_POINTERS = {"x_ptr", "codes_ptr", "scales_ptr", "offset_ptr", "out_ptr", "grad_ptr", "partial_ptr"}
_ALIGNED = {"x_stride", "grad_stride", "padded_rows", "in_features", "out_features"}
"""Integers that are multiples of 16 in any model, as the compiler is told at run time."""
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)$")


@dataclass(frozen=True)
class Compiled:
    """What a kernel became.

    Attributes:
        ptx: the assembly text.
        shared_bytes: shared memory of a block.
        registers: of a thread.
        stack_bytes: of a thread; more than 0 where registers spill.
        loop: instructions of the longest loop, by mnemonic without modifiers.
    """

    ptx: str
    shared_bytes: int
    registers: int
    stack_bytes: int
    loop: Counter[str]


def compile_product(
    capability: int,
    tile: Tile,
    bits: int,
    group_size: int = 128,
    dtype: str = "bf16",
    exact: bool = False,
    has_offset: bool = False,
    words: int = 4,
) -> Compiled:
    """The product for one tile, in many steps, with fp16 scales.

    Args:
        capability: such as 80 or 90.
        dtype: of the activations, as Triton writes it: `bf16` or `fp16`.
        words: see `layout.GpuWeight`.
    """
    parts = PARTS[bits]
    constants = {
        "BITS": bits, "KIND": parts[0], "SECOND_KIND": parts[1] if len(parts) > 1 else 0, "GROUP": group_size,
        "WORDS": words, "HAS_OFFSET": has_offset, "EXACT": exact, "HALF": dtype == "fp16", "ROWS": ROWS,
        "COLUMNS": tile.columns, "TILES": 16, "RUN": tile.run, "STAGES": tile.stages,
    }  # fmt: skip
    types = {"x_ptr": dtype, "codes_ptr": "i32", "scales_ptr": "fp16", "offset_ptr": "fp32", "out_ptr": "fp32"}
    return _compile(forward.product_kernel, types, constants, capability, tile.warps)


def compile_gradients(capability: int, bits: int, dtype: str = "bf16", words: int = 4) -> tuple[Compiled, Compiled]:
    """The kernels for the gradients of the input and of the scales."""
    parts = PARTS[bits]
    shared = {"BITS": bits, "KIND": parts[0], "SECOND_KIND": parts[1] if len(parts) > 1 else 0, "WORDS": words}
    shared |= {"HAS_OFFSET": True, "ROWS": 16, "COLUMNS": 16}
    types = {"grad_ptr": dtype, "x_ptr": dtype, "codes_ptr": "i32", "scales_ptr": "fp16", "offset_ptr": "fp32"}
    types["out_ptr"] = "fp32"
    return (
        _compile(
            backward.input_gradient_kernel,
            types,
            shared | {"GROUP": 128, "EXACT": True, "BLOCKS": 8},
            capability,
            4,
        ),
        _compile(backward.scale_gradient_kernel, types, shared | {"STEPS": 8}, capability, 4),
    )


def compile_passes(capability: int, bits: int, words: int = 4) -> tuple[Compiled, Compiled]:
    """The dense copy, and the sum over splits."""
    parts = PARTS[bits]
    constants = {"BITS": bits, "KIND": parts[0], "SECOND_KIND": parts[1] if len(parts) > 1 else 0, "GROUP": 128}
    constants |= {"WORDS": words, "HAS_OFFSET": True, "ROWS": 16}
    types = {"codes_ptr": "i32", "scales_ptr": "fp16", "offset_ptr": "fp32", "out_ptr": "bf16", "partial_ptr": "fp32"}
    return (
        _compile(forward.dequantize_kernel, types, constants, capability, 4),
        _compile(forward.sum_kernel, types, {"SPLITS": 8, "BLOCK": 1024}, capability, 4),
    )


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int) -> Compiled:
    if interpreted():
        raise KernelError("TRITON_INTERPRET is set, so that nothing can be compiled; unset it")
    names = kernel.arg_names
    signature = {
        name: f"*{types[name]}" if name in _POINTERS else "constexpr" if name in constants else "i32" for name in names
    }
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in _POINTERS | _ALIGNED}
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(
        ptx=built.asm["ptx"],
        shared_bytes=built.metadata.shared,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        loop=_longest_loop(sass),
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    return subprocess.run(
        [knobs.nvidia.cuobjdump.path, option, str(cubin)], capture_output=True, text=True, check=True
    ).stdout


def _longest_loop(sass: str) -> Counter[str]:
    """Instructions between a backward branch and its target, where they are the most."""
    lines = [match for line in sass.splitlines() if (match := _INSTRUCTION.match(line))]
    addresses = [int(match[1], 16) for match in lines]
    first, last = 1, 0
    for address, match in zip(addresses, lines, strict=True):
        target = re.search(r"0x([0-9a-f]+)", match[3]) if match[2] == "BRA" else None
        if target and int(target[1], 16) < address and address - int(target[1], 16) > last - first:
            first, last = int(target[1], 16), address
    return Counter(match[2] for address, match in zip(addresses, lines, strict=True) if first <= address <= last)
