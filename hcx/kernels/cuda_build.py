"""CUDA C++ sources (kernels/cuda) compiled when they are first needed, loaded and launched, with no build step before.

nvcc is used where it is installed, else the run-time compiler that comes with torch (NVRTC). The driver's own interface
is called through ctypes, so no compiler of the host and no torch headers are needed. Launches go to torch's current
stream and may be captured in a CUDA graph once the kernel was launched before.

Compiling with nvcc is tested; NVRTC, loading and launching have never run on a GPU.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hcx.artifacts.resources import find_resource
from hcx.errors import KernelError


def architecture(major: int, minor: int) -> str:
    """The target of a compute capability; Hopper's own instructions need the `a`."""
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def why_no_compiler() -> str | None:
    """Why CUDA sources cannot be compiled here; None if they can."""
    if shutil.which("nvcc") or _nvrtc() is not None:
        return None
    return "there is no CUDA compiler: neither nvcc on the PATH nor the run-time compiler (libnvrtc) beside torch"


def compile_cubin(source: str, target: str, defines: Mapping[str, int]) -> bytes:
    """The machine code of a shipped source.

    Args:
        source: such as `kernels/cuda/lut_gemm.cu`.
        target: as `architecture` gives it.
        defines: macros.

    Raises:
        KernelError: no compiler, or it refuses; with its message.
    """
    path = find_resource(source)
    options = [f"-D{name}={value}" for name, value in defines.items()]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "kernel.cubin"
            code = f"-gencode=arch=compute_{target},code=sm_{target}"
            command = [nvcc, "-cubin", "-std=c++17", code, *options, "-o", str(out), str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise KernelError(f"{path}: nvcc fails: {done.stderr.strip()}")
            return out.read_bytes()
    reason = why_no_compiler()
    if reason is not None:
        raise KernelError(reason)
    return _compile_with_nvrtc(path, target, options)


@cache
def _nvrtc() -> ctypes.CDLL | None:
    beside = [found for folder in sys.path for found in sorted(glob.glob(f"{folder}/nvidia/*/lib/libnvrtc.so.*"))]
    for name in ["libnvrtc.so.13", "libnvrtc.so.12", *beside]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _compile_with_nvrtc(path: Path, target: str, options: Sequence[str]) -> bytes:
    library = _nvrtc()
    assert library is not None
    program = ctypes.c_void_p()
    text = path.read_bytes()
    status = library.nvrtcCreateProgram(ctypes.byref(program), text, path.name.encode(), 0, None, None)
    if status != 0:
        raise KernelError(f"{path}: NVRTC cannot start (status {status})")
    arguments = [option.encode() for option in (f"--gpu-architecture=sm_{target}", "--std=c++17", *options)]
    status = library.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
    what = "CUBIN" if status == 0 else "ProgramLog"
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if status != 0:
        raise KernelError(f"{path}: NVRTC fails: {buffer.value.decode(errors='replace').strip()}")
    return buffer.raw


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the CUDA driver cannot be loaded: {error}") from None


def _check(status: int, what: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"the CUDA driver refuses to {what}: {(text.value or b'unknown').decode()} ({status})")


@cache
def _function(
    source: str, digest: str, name: str, defines: tuple[tuple[str, int], ...], device: int
) -> ctypes.c_void_p:
    torch.cuda.init()
    with torch.cuda.device(device):
        # Torch makes its context current with the first allocation on a device.
        torch.empty(1, device="cuda")
        cubin = compile_cubin(source, architecture(*torch.cuda.get_device_capability(device)), dict(defines))
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), f"load {source}")
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"find {name} in {source}")
    return function


def launch(
    source: str,
    name: str,
    defines: Mapping[str, int],
    grid: tuple[int, int],
    threads: int,
    arguments: Sequence[torch.Tensor | int | None],
) -> None:
    """Launches a kernel on the current stream of the first tensor's device.

    Args:
        source, defines: as for `compile_cubin`.
        name: of the `extern "C"` function.
        grid: blocks.
        threads: of a block.
        arguments: tensors as pointers, None as a null pointer, integers as 32-bit ints.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    digest = hashlib.sha256(find_resource(source).read_bytes()).hexdigest()
    function = _function(source, digest, name, tuple(sorted(defines.items())), device.index or 0)
    values: list[Any] = [
        ctypes.c_int(argument)
        if isinstance(argument, int)
        else ctypes.c_void_p(argument.data_ptr() if argument is not None else None)
        for argument in arguments
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = _driver().cuLaunchKernel(function, *grid, 1, threads, 1, 1, 0, stream, pointers, None)
        _check(status, f"launch {name}")
