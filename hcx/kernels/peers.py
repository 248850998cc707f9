"""Other libraries as contenders of the benchmark: onnxruntime where it is installed, ggml where the user points to it.

Neither is needed for anything else.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcx.errors import KernelError, MissingExtra
from hcx.kernels.bench import GROUP, Contender, KernelCase, copies_of

GGML_TYPES = {
    "bf16": (30, 16.0),
    "tq2_0": (35, 2.0625),
    "q2_K": (10, 2.625),
    "q3_K": (11, 3.4375),
    "q4_0": (2, 4.5),
    "q4_K": (12, 4.5),
}
"""Numbers of ggml's types, and their bits per weight with scales."""
GGML_REPACKED = ("q2_K", "q4_0", "q4_K")
"""Types that ggml also has in a layout of its own for this CPU."""


def available() -> dict[str, Callable[[KernelCase, Tensor, int], Iterator[Contender]]]:
    """Makers of contenders by name, of the libraries that are here."""
    found: dict[str, Callable[[KernelCase, Tensor, int], Iterator[Contender]]] = {}
    if importlib.util.find_spec("onnxruntime") is not None:
        found["onnxruntime"] = onnxruntime_contenders
    if os.environ.get("HCX_GGML_LIBRARY"):
        found["ggml"] = ggml_contenders
    return found


def onnxruntime_contenders(case: KernelCase, x: Tensor, footprint: int) -> Iterator[Contender]:
    """`MatMulNBits` with 4 and 2 bits, groups of 128 and int8 accumulation: the nearest to ours.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime", "bench", "the onnxruntime rows of `hcx bench kernels`") from None

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 3
    rows, random = x.numpy(), np.random.default_rng(0)
    for bits in (4, 2):
        shape = (case.out_features, case.in_features // GROUP, GROUP * bits // 8)
        count = copies_of(case.out_features * case.in_features * bits // 8, case, footprint)
        codes = random.integers(0, 256, shape, dtype=np.uint8)
        scales = (random.random(shape[:2]) + 0.5).astype(np.float32)
        model = _matmul_nbits(case, bits, codes, scales)
        try:
            sessions = [onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"]) for _ in range(count)]
        except Exception as error:  # its own exceptions have no common base; an older release lacks 2 bits
            if bits == 4:
                raise KernelError(f"onnxruntime {onnxruntime.__version__} refuses MatMulNBits: {error}") from error
            continue

        def run(copy: int, sessions: list[Any] = sessions) -> Tensor:
            return torch.from_numpy(sessions[copy].run(None, {"x": rows})[0])

        parts = [(codes >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
        levels = np.stack(parts, -1).reshape(*shape[:2], GROUP).astype(np.float64) - 2 ** (bits - 1)
        dense = (levels * scales[..., None]).reshape(case.out_features, case.in_features)
        size = codes.nbytes + scales.nbytes
        yield Contender(
            f"onnxruntime-{bits}bit",
            bits,
            GROUP,
            "int8",
            None,
            run,
            x.double() @ torch.from_numpy(dense).t(),
            count,
            size,
        )


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a varint, or bytes with their length."""

    def varint(rest: int) -> bytes:
        out = bytearray()
        while rest > 127:
            out.append(rest & 127 | 128)
            rest >>= 7
        return bytes([*out, rest])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def _matmul_nbits(case: KernelCase, bits: int, codes: np.ndarray, scales: np.ndarray) -> bytes:
    """An ONNX model of one `com.microsoft.MatMulNBits` node; written by hand, so that no further package is needed."""
    attributes = {
        "K": case.in_features,
        "N": case.out_features,
        "bits": bits,
        "block_size": GROUP,
        "accuracy_level": 4,  # int8 accumulation
    }
    node = b"".join(_field(1, name) for name in (b"x", b"codes", b"scales")) + _field(2, b"y")
    node += _field(4, b"MatMulNBits") + _field(7, b"com.microsoft")
    for name, value in attributes.items():
        node += _field(5, _field(1, name.encode()) + _field(3, value) + _field(20, 2))

    def tensor(name: bytes, array: np.ndarray, kind: int) -> bytes:
        dims = b"".join(_field(1, size) for size in array.shape)
        return dims + _field(2, kind) + _field(8, name) + _field(9, array.tobytes())

    def interface(name: bytes, width: int) -> bytes:
        dims = b"".join(_field(1, _field(1, size)) for size in (case.batch, width))
        return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))

    graph = _field(1, node) + _field(2, b"product")
    graph += _field(5, tensor(b"codes", codes, 2)) + _field(5, tensor(b"scales", scales, 1))
    graph += _field(11, interface(b"x", case.in_features)) + _field(12, interface(b"y", case.out_features))
    opsets = _field(8, _field(2, 17)) + _field(8, _field(1, b"com.microsoft") + _field(2, 1))
    return _field(1, 8) + _field(7, graph) + opsets


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _ggml() -> ctypes.CDLL:
    path = os.environ["HCX_GGML_LIBRARY"]
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise KernelError(f"HCX_GGML_LIBRARY = {path}: {error}; name ggml's shared library, libggml.so") from None
    pointers, sizes = ctypes.c_void_p, ctypes.c_size_t
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_init": (pointers, (_InitParams,)),
        "ggml_new_tensor_2d": (pointers, (pointers, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)),
        "ggml_mul_mat": (pointers, (pointers, pointers, pointers)),
        "ggml_new_graph": (pointers, (pointers,)),
        "ggml_build_forward_expand": (None, (pointers, pointers)),
        "ggml_nbytes": (sizes, (pointers,)),
        "ggml_get_data": (pointers, (pointers,)),
        "ggml_quantize_chunk": (
            sizes,
            (ctypes.c_int, pointers, pointers, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointers),
        ),
        "ggml_backend_cpu_init": (pointers, ()),
        "ggml_backend_cpu_set_n_threads": (None, (pointers, ctypes.c_int)),
        "ggml_backend_cpu_buffer_type": (pointers, ()),
        "ggml_backend_get_device": (pointers, (pointers,)),
        "ggml_backend_dev_backend_reg": (pointers, (pointers,)),
        "ggml_backend_reg_get_proc_address": (pointers, (pointers, ctypes.c_char_p)),
        "ggml_backend_buft_name": (ctypes.c_char_p, (pointers,)),
        "ggml_backend_buft_get_alloc_size": (sizes, (pointers, pointers)),
        "ggml_backend_buft_alloc_buffer": (pointers, (pointers, sizes)),
        "ggml_backend_buffer_get_base": (pointers, (pointers,)),
        "ggml_backend_tensor_alloc": (ctypes.c_int, (pointers, pointers, pointers)),
        "ggml_backend_tensor_set": (None, (pointers, pointers, sizes, sizes)),
        "ggml_backend_graph_compute": (ctypes.c_int, (pointers, pointers)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments)
    return library


def _repacking_buffer(library: ctypes.CDLL, backend: int) -> int | None:
    """ggml's buffer type that repacks weights as they are written, if this build has one."""
    device = library.ggml_backend_get_device(backend)
    registry = library.ggml_backend_dev_backend_reg(device)
    address = library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    number = 0
    while kinds and kinds[number]:
        if b"REPACK" in library.ggml_backend_buft_name(kinds[number]).upper():
            return int(kinds[number])
        number += 1
    return None


def ggml_contenders(case: KernelCase, x: Tensor, footprint: int) -> Iterator[Contender]:
    """ggml's formats, plain and repacked for this CPU, one `mul_mat` a call. Its memory is freed with the process."""
    library = _ggml()
    backend = library.ggml_backend_cpu_init()
    library.ggml_backend_cpu_set_n_threads(backend, case.threads)
    plain, repacking = library.ggml_backend_cpu_buffer_type(), _repacking_buffer(library, backend)
    dense = torch.randn(case.out_features, case.in_features, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ dense.double().t()
    for name, (kind, bits) in GGML_TYPES.items():
        size = int(case.out_features * case.in_features * bits / 8)
        stored = torch.empty(size, dtype=torch.uint8)
        if name == "bf16":
            stored = dense.bfloat16().view(torch.uint8).flatten().contiguous()
        else:
            library.ggml_quantize_chunk(
                kind, dense.data_ptr(), stored.data_ptr(), 0, case.out_features, case.in_features, None
            )
        layouts = [("", plain)]
        if name in GGML_REPACKED and repacking is not None:
            layouts.append(("-repacked", repacking))
        for suffix, buffer in layouts:
            count = copies_of(size, case, footprint)
            graphs = [_graph(library, case, kind, buffer, plain, stored, x) for _ in range(count)]

            def run(copy: int, graphs: list[tuple[int, int]] = graphs) -> Tensor:
                library.ggml_backend_graph_compute(backend, graphs[copy][0])
                return _result(library, graphs[copy][1], case)

            numerics = "bf16" if name == "bf16" else "int8"
            yield Contender(f"ggml-{name}{suffix}", bits, 0, numerics, None, run, expected, count, size)


def _graph(
    library: ctypes.CDLL, case: KernelCase, kind: int, buffer: int, plain: int, stored: Tensor, x: Tensor
) -> tuple[int, int]:
    """(a graph of one product, its output)."""
    context = library.ggml_init(_InitParams(1 << 20, None, True))
    weight = library.ggml_new_tensor_2d(context, kind, case.in_features, case.out_features)
    rows = library.ggml_new_tensor_2d(context, 0, case.in_features, case.batch)
    output = library.ggml_mul_mat(context, weight, rows)
    for tensor, place in ((weight, buffer), (rows, plain), (output, plain)):
        memory = library.ggml_backend_buft_alloc_buffer(
            place, library.ggml_backend_buft_get_alloc_size(place, tensor) + 64
        )
        library.ggml_backend_tensor_alloc(memory, tensor, library.ggml_backend_buffer_get_base(memory))
    library.ggml_backend_tensor_set(weight, stored.data_ptr(), 0, library.ggml_nbytes(weight))
    library.ggml_backend_tensor_set(rows, x.data_ptr(), 0, library.ggml_nbytes(rows))
    graph = library.ggml_new_graph(context)
    library.ggml_build_forward_expand(graph, output)
    return graph, output


def _result(library: ctypes.CDLL, output: int, case: KernelCase) -> Tensor:
    count = case.batch * case.out_features
    data = (ctypes.c_float * count).from_address(library.ggml_get_data(output))
    return torch.frombuffer(data, dtype=torch.float32).view(case.batch, case.out_features)
