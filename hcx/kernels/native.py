"""The door to the native library (kernels/): finding it, and its C functions with checked arguments.

The library lies in this package (a wheel that was built with a compiler) or in the checkout's `build/kernels/` (`make
kernels`). `HCX_KERNELS_LIBRARY` names another file; it is then honoured or refused, never replaced.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcx.errors import KernelError, did_you_mean
from hcx.kernels.format import PackedWeight

ABI_VERSION = 1
ALIGNMENT = 64
"""Bytes; of the memory of a packed weight."""
LARGE_PAGE = 2 << 20
"""Bytes."""
ISAS = {"best": 0, "portable": 1, "avx2": 2, "avx512": 3}
METHODS = {"fast": 0, "tables8": 1, "codes8": 2, "tables15": 3}
"""`fast` takes the quicker of `tables8` and `codes8`; kernels/README.md describes them."""
SCALE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


class _Shape(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("has_offset", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Weight(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


_P, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_CANONICAL = (_P, _P, _I64, _P, _I64, _P, _I64)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "hcx_abi_version": (),
    "hcx_best_isa": (),
    "hcx_fast_method": (_I32, _I64, _I32),
    "hcx_advise": (_P, _I64),
    "hcx_bcq_packed_bytes": (_P, _P),
    "hcx_bcq_pack": (*_CANONICAL, _P, _I64),
    "hcx_bcq_set_scales": (_P, _I64, _P, _I64, _P, _I64),
    "hcx_bcq_describe": (_P, _I64, _P),
    "hcx_bcq_dequantize": (_P, _I64, _P, _I64, _I32),
    "hcx_bcq_matmul": (_P, _I32, _P, _I64, _I64, _P, _I64, _I32, _I32, _I32),
    "hcx_biqgemm_packed_bytes": (_P, _P),
    "hcx_biqgemm_pack": (*_CANONICAL, _P, _I64),
    "hcx_biqgemm_matmul": (_P, _I64, _P, _I64, _I64, _P, _I64, _I32),
    "hcx_biqgemm_table": (_P, _P),
    "hcx_gf2_decode": (_P, _P, _I64, _P, _I64, _P, _I64, _I32),
    "hcx_gf2_correct": (_P, _P, _I64, _P, _I64),
    "hcx_gf2_encode": (_P, _P, _I64, _P, _P, _I64, _P, _I64, _P, _I32, _I32),
    "hcx_bit_transpose": (_P, _I64, _I64, _P, _I64),
    "hcx_decode_step": (_P, _P, _P, _I64, _P, _I32, _I32, _I32),
    "hcx_bcq_alternate": (_P, _P, _I64, _I64, _I32, _I32, _I32, _I32, _P, _P, _P, _I32),
    "hcx_bcq_feed_back": (_P, _P, _P, _P, _P, _I32),
    "hcx_bcq_choose_codes": (_P, _P, _P, _P, _I32, _I32),
    "hcx_read": (_P, _I64, _I32, _P),
}


def library_paths() -> list[Path]:
    """Where the library is looked for, in order."""
    named = os.environ.get("HCX_KERNELS_LIBRARY")
    if named:
        return [Path(named)]
    here = Path(__file__).resolve().parent
    return [folder / f"libhcx_kernels{_SUFFIX}" for folder in (here, here.parents[1] / "build" / "kernels")]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(the library, its path) or (None, why it is not there)."""
    paths = library_paths()
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        if os.environ.get("HCX_KERNELS_LIBRARY"):
            return None, f"HCX_KERNELS_LIBRARY = {paths[0]}: no such file"
        return None, "the native library is not built: run `make kernels`, or install hcx where a C++ compiler is"
    try:
        library = ctypes.CDLL(str(found))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = list(arguments), _I32
        for name in ("hcx_status_text", "hcx_isa_text"):
            getattr(library, name).argtypes, getattr(library, name).restype = [_I32], ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, f"{found} cannot be used: {error}; run `make kernels` again"
    version = library.hcx_abi_version()
    if version != ABI_VERSION:
        return None, f"{found} has interface {version}, this hcx needs {ABI_VERSION}; run `make kernels` again"
    return library, str(found)


def why_absent() -> str | None:
    """Why there is no native library; None if there is one."""
    library, text = _load()
    return text if library is None else None


def library() -> ctypes.CDLL:
    """The native library.

    Raises:
        KernelError: there is none; with the reason and the next step.
    """
    loaded, text = _load()
    if loaded is None:
        raise KernelError(text)
    return loaded


def library_path() -> str | None:
    """The file that is in use, or None."""
    loaded, text = _load()
    return None if loaded is None else text


def isa_name() -> str:
    """The instruction set that kernels use on this CPU."""
    return str(library().hcx_isa_text(library().hcx_best_isa()).decode())


def best_isa() -> str:
    """The same, as a key of `ISAS`."""
    code = library().hcx_best_isa()
    return next(name for name, value in ISAS.items() if value == code)


def code_of(name: str, codes: dict[str, int], what: str) -> int:
    """A name's number in the C interface.

    Raises:
        KernelError: there is no such name.
    """
    if name not in codes:
        raise KernelError(f"{what} = {name!r}; {did_you_mean(name, codes)}")
    return codes[name]


def check(status: int, what: str) -> None:
    """Raises what a status says.

    Raises:
        KernelError: the status is not 0.
    """
    if status != 0:
        raise KernelError(f"{what}: {library().hcx_status_text(status).decode()}")


def aligned_empty(num_bytes: int) -> Tensor:
    """Uninitialised uint8 memory that begins at a multiple of `ALIGNMENT`, in large pages where that pays."""
    alignment = LARGE_PAGE if num_bytes >= LARGE_PAGE else ALIGNMENT
    memory = torch.empty(num_bytes + alignment, dtype=torch.uint8)
    skip = -memory.data_ptr() % alignment
    if alignment == LARGE_PAGE:
        check(library().hcx_advise(memory.data_ptr(), memory.numel()), "asking for large pages")
    return memory[skip : skip + num_bytes]


@dataclass(frozen=True)
class NativeWeight:
    """A weight in a machine layout.

    Attributes:
        data: uint8, aligned; what `pack` wrote.
        out_features, in_features, group_size, bits: of the weight.
        scale_dtype: of the scales inside.
        has_offset: whether there are offsets inside.
        kind: the layout, `bcq` or `biqgemm`.
    """

    data: Tensor
    out_features: int
    in_features: int
    group_size: int
    bits: int
    scale_dtype: torch.dtype
    has_offset: bool
    kind: str = "bcq"
    _handles: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def size_bytes(self) -> int:
        """Bytes that a product reads."""
        return self.data.numel()

    @cached_property
    def handle(self) -> Any:
        """A C array with this weight alone."""
        return handle_of([self.data])

    def group_handle(self, others: Sequence[NativeWeight]) -> Any:
        """A C array of this weight and those that share its input."""
        key = tuple(id(other) for other in others)
        if key not in self._handles:
            # The weights themselves are kept: an id may be given out again only after its object is gone.
            self._handles[key] = (handle_of([self.data, *(other.data for other in others)]), tuple(others))
        return self._handles[key][0]


def handle_of(packed: Sequence[Tensor]) -> Any:
    """A C array of packed weights; it keeps their memory alive."""
    handle: Any = (_Weight * len(packed))(*(_Weight(data.data_ptr(), data.numel()) for data in packed))
    handle.tensors = tuple(packed)
    return handle


def _shape(weight: PackedWeight) -> _Shape:
    return _Shape(
        weight.out_features,
        weight.in_features,
        weight.group_size,
        weight.bits,
        SCALE_CODES[weight.scales.dtype],
        weight.offset is not None,
        0,
    )


def pack(weight: PackedWeight, kind: str = "bcq") -> NativeWeight:
    """The machine layout of a packed weight on the CPU.

    Raises:
        KernelError: its group or its size is outside what the kernels serve.
    """
    functions, shape, size = library(), _shape(weight), ctypes.c_int64()
    what = f"packing {weight.out_features} x {weight.in_features}, {weight.bits} bits, groups of {weight.group_size}"
    check(getattr(functions, f"hcx_{kind}_packed_bytes")(ctypes.byref(shape), ctypes.byref(size)), what)
    data = aligned_empty(size.value)
    planes, scales = weight.planes.contiguous(), weight.scales.contiguous()
    offset = None if weight.offset is None else weight.offset.contiguous()
    status = getattr(functions, f"hcx_{kind}_pack")(
        ctypes.byref(shape), *_memory(planes), *_memory(scales), *_memory(offset), *_memory(data)
    )
    check(status, what)
    return NativeWeight(
        data=data,
        out_features=weight.out_features,
        in_features=weight.in_features,
        group_size=weight.group_size,
        bits=weight.bits,
        scale_dtype=weight.scales.dtype,
        has_offset=weight.offset is not None,
        kind=kind,
    )


def _memory(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.numel() * tensor.element_size())


def set_scales(data: Tensor, scales: Tensor, offset: Tensor | None) -> None:
    """Writes scales `[q, out, groups]` (of the dtype it was packed with) and offsets into a weight of layout `bcq`.

    Raises:
        KernelError: the sizes do not fit.
    """
    scales = scales.contiguous()
    offset = None if offset is None else offset.contiguous()
    check(library().hcx_bcq_set_scales(*_memory(data), *_memory(scales), *_memory(offset)), "writing scales")


def dequantize(data: Tensor, out_features: int, in_features: int) -> Tensor:
    """The dense weight `[out, in]` fp32 of a weight of layout `bcq`; bit for bit `PackedWeight.dequantize`.

    Raises:
        KernelError: the buffer is not such a weight.
    """
    dense = torch.empty(out_features, in_features)
    check(library().hcx_bcq_dequantize(*_memory(data), *_memory(dense), torch.get_num_threads()), "dequantizing")
    return dense


def matmul(
    x: Tensor,
    handle: Any,
    out_features: int,
    in_features: int,
    method: str = "fast",
    isa: str = "best",
    threads: int = 0,
) -> Tensor:
    """`x W^T` for the weights of a handle, outputs concatenated: `[..., in] -> [..., out]` in the dtype of `x`.

    Args:
        x: floating point, on the CPU.
        handle: `NativeWeight.handle`, `group_handle` or `handle_of`.
        out_features: rows of all weights together.
        in_features: inputs of each of them.
        method: a key of `METHODS`.
        isa: a key of `ISAS`; forced down to what the CPU has.
        threads: at most; torch's number if 0.

    Raises:
        KernelError: sizes disagree, or a buffer is not a packed weight.
    """
    rows, y = _rows(x, out_features, in_features)
    status = library().hcx_bcq_matmul(
        handle,
        len(handle),
        rows.data_ptr(),
        in_features,
        rows.numel() // in_features,
        y.data_ptr(),
        out_features,
        code_of(method, METHODS, "method"),
        code_of(isa, ISAS, "isa"),
        threads or torch.get_num_threads(),
    )
    if status != 0:
        check(status, "product")
    return y if y.dtype == x.dtype else y.to(x.dtype)


def biqgemm(x: Tensor, weight: NativeWeight, threads: int = 0) -> Tensor:
    """The same for a weight of layout `biqgemm`.

    Raises:
        KernelError: sizes disagree, or the buffer is not such a weight.
    """
    rows, y = _rows(x, weight.out_features, weight.in_features)
    status = library().hcx_biqgemm_matmul(
        *_memory(weight.data),
        rows.data_ptr(),
        weight.in_features,
        rows.numel() // weight.in_features,
        y.data_ptr(),
        weight.out_features,
        threads or torch.get_num_threads(),
    )
    check(status, "product")
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _rows(x: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    if x.shape[-1] != in_features or not x.is_floating_point() or x.device.type != "cpu":
        raise KernelError(
            f"input is {x.dtype} {tuple(x.shape)} on {x.device}; "
            f"expected floating point [..., {in_features}] on the CPU"
        )
    # Most calls need no copy, and a decoded token makes hundreds of them.
    rows = x if x.dtype is torch.float32 and x.is_contiguous() else x.detach().to(torch.float32).contiguous()
    return rows, torch.empty(*x.shape[:-1], out_features)


def table_of(x: Tensor) -> Tensor:
    """BiQGEMM's table of 8 inputs: fp32 `[8] -> [256]`."""
    table = torch.empty(256)
    check(library().hcx_biqgemm_table(x.contiguous().data_ptr(), table.data_ptr()), "table")
    return table


def require(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuses a tensor that the C interface would read wrongly.

    Raises:
        KernelError: its type, shape, layout or device is another.
    """
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.is_cuda:
        raise KernelError(
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
            f"{'' if tensor.is_contiguous() else 'not '}contiguous; expected {dtype} {shape}, contiguous, on the CPU"
        )


def read_floor(data: Tensor, threads: int = 1) -> int:
    """Reads a tensor's memory as fast as the CPU can; returns the exclusive or of its 64-bit words."""
    found = ctypes.c_uint64()
    check(library().hcx_read(*_memory(data), threads, ctypes.byref(found)), "reading")
    return found.value
