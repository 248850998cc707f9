"""The CUDA sources compile for Ampere and Hopper, and give the right numbers when run thread by thread on the host."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import PackedWeight, Spec, cuda_build, lut_gpu
from hcx.kernels.format import pack_signs
from hcx.kernels.lut_gpu import LutBackend, LutWeight, configuration, num_steps, pack

ROOT = Path(__file__).parents[2]
SUMS = 1e-6
"""Relative L2 error of fp32 tables and sums of a few hundred inputs: 2^-24 times the root of their number."""

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler (nvcc not found)")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++ not found)")


def weight(bits: int, rows: int, inputs: int, group: int, *, offset: bool, dtype: torch.dtype) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    groups = -(-inputs // group)
    return PackedWeight(
        pack_signs(torch.rand(bits, rows, inputs, generator=generator) < 0.5),
        torch.randn(bits, rows, groups, generator=generator).to(dtype),
        torch.randn(rows, groups, generator=generator) if offset else None,
        inputs,
        group,
    )


@pytest.fixture(scope="module")
def host_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, int]], ctypes.CDLL]:
    """Compiles the very source of the kernel for the host, with fibres as threads."""
    folder = tmp_path_factory.mktemp("host")
    pointers = "void* x, void* words, void* scales, void* offset, void* out"
    main = folder / "host.cpp"
    main.write_text(
        f'#include "{Path(__file__).parent / "cuda_on_host.h"}"\n#include "{ROOT / lut_gpu.SOURCE}"\n'
        f'extern "C" int run(int gx, int gy, int backwards, {pointers}, int rows, int inputs, '
        "int stride, int steps, int per)\n"
        "{ return hcx_run(gx, gy, THREADS, backwards, [=] { hcx_lut_gemm((const Number<HCX_INPUT>::Stored*)x,\n"
        "  (const u32*)words, (const Number<HCX_SCALE>::Stored*)scales, (const float*)offset, (float*)out,\n"
        "  rows, inputs, stride, steps, per); }); }\n"
        'extern "C" void table(float* out, const float* x)\n'
        "{ for (int member = 0; member < TEAM; ++member) { float all[256];\n"
        "    build_table(all, x, member);\n"
        "    for (int k = member; k < 128; k += TEAM) { out[k] = all[k]; out[255 - k] = all[255 - k]; } } }\n"
    )

    def build(defines: dict[str, int]) -> ctypes.CDLL:
        out = folder / f"{'_'.join(str(value) for value in defines.values())}.so"
        if not out.exists():
            options = [f"-D{name}={value}" for name, value in defines.items()]
            command = ["g++", "-O1", "-w", "-std=c++17", "-shared", "-fPIC", *options, str(main), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(out))

    return build


def product_on_host(
    build: Callable[[dict[str, int]], ctypes.CDLL], x: Tensor, packed: LutWeight, splits: int = 1, backwards: int = 0
) -> Tensor:
    defines = configuration(packed, x.shape[0], x.dtype)
    rows = packed.words.shape[2]
    steps = num_steps(x.shape[1], defines)
    per_split = -(-steps // splits)
    out = torch.full((-(-steps // per_split), x.shape[0], rows), torch.nan)
    arguments = [x, packed.words, packed.scales, packed.offset, out]
    diverged = build(defines).run(
        -(-rows // lut_gpu.BLOCK_ROWS),
        out.shape[0],
        backwards,
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in arguments),
        *(rows, x.shape[1], x.stride(0), steps, per_split),
    )
    assert diverged == 0, "some threads ended while others waited at a barrier"
    return out.sum(0)


# bits, rows, inputs, group, columns, offset, scales, activations
CASES = [
    (1, 5, 70, 32, 1, False, torch.float16, torch.float16),
    (2, 1030, 200, 64, 3, True, torch.bfloat16, torch.bfloat16),  # more rows than a block has
    (3, 33, 150, 150, 8, True, torch.float32, torch.float32),
    (8, 7, 300, 96, 2, False, torch.float16, torch.bfloat16),
]


@needs_gxx
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"q{case[0]}-g{case[3]}-n{case[4]}")
def test_integers_are_multiplied_exactly_in_any_order_of_threads(case: tuple, host_kernel: Callable) -> None:
    bits, rows, inputs, group, columns, offset, scale_dtype, dtype = case
    random = weight(bits, rows, inputs, group, offset=offset, dtype=scale_dtype)
    powers = 2.0 ** -torch.arange(bits)[:, None, None] * random.scales.float().sign()
    offsets = None if random.offset is None else (2 * random.offset).round() / 2
    packed = replace(random, scales=powers.to(scale_dtype), offset=offsets)
    x = torch.randint(-7, 8, (columns, inputs), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (x.double() @ packed.dequantize().double().t()).float()
    for splits, backwards in ((1, 0), (1, 1), (2, 0)):
        assert torch.equal(product_on_host(host_kernel, x, pack(packed), splits, backwards), expected)


@needs_gxx
@pytest.mark.parametrize("case", CASES[1:3], ids=lambda case: f"q{case[0]}-g{case[3]}-n{case[4]}")
def test_nothing_but_fp32_sums_is_rounded(case: tuple, host_kernel: Callable) -> None:
    bits, rows, inputs, group, columns, offset, scale_dtype, dtype = case
    packed = weight(bits, rows, inputs, group, offset=offset, dtype=scale_dtype)
    x = torch.randn(columns, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ packed.dequantize().double().t()
    found = product_on_host(host_kernel, x, pack(packed))
    assert float((found - expected).norm() / expected.norm()) <= SUMS
    alone = torch.cat([product_on_host(host_kernel, row, pack(packed)) for row in x[:2].split(1)])
    # One column may take two words a step, and so sum in another order, where eight take one.
    same_steps = (
        configuration(pack(packed), 1, dtype)["HCX_WORDS"] == configuration(pack(packed), columns, dtype)["HCX_WORDS"]
    )
    assert torch.equal(alone, found[:2]) or not same_steps


@needs_gxx
def test_a_table_holds_every_signed_sum_and_is_antisymmetric_bit_for_bit(host_kernel: Callable) -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    found = torch.empty(256)
    library = host_kernel(
        dict(
            zip(
                ("HCX_BITS", "HCX_COLUMNS", "HCX_WORDS", "HCX_GROUP", "HCX_SCALE", "HCX_INPUT"),
                (1, 1, 1, 32, 0, 0),
                strict=True,
            )
        )
    )
    library.table(ctypes.c_void_p(found.data_ptr()), ctypes.c_void_p(x.data_ptr()))
    signs = 2.0 * (torch.arange(256)[:, None] >> torch.arange(8) & 1) - 1
    torch.testing.assert_close(
        found.double(), signs.double() @ x.double(), rtol=0, atol=8 * 2.0**-23 * float(x.abs().sum())
    )
    assert torch.equal(found.flip(0), -found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"q{case[0]}-g{case[3]}")
def test_the_table_layout_gives_back_the_weight(case: tuple) -> None:
    bits, rows, inputs, group, _, offset, scale_dtype, _ = case
    packed = weight(bits, rows, inputs, group, offset=offset, dtype=scale_dtype)
    back = pack(packed).canonical()
    assert torch.equal(back.planes, packed.planes)
    assert torch.equal(back.dequantize(), packed.dequantize())


@needs_nvcc
@pytest.mark.parametrize("target", ["80", "90a"])
def test_the_sources_compile_for_ampere_and_hopper(target: str, tmp_path: Path) -> None:
    for case in (CASES[0], CASES[2]):
        bits, rows, inputs, group, columns, offset, scale_dtype, dtype = case
        packed = pack(weight(bits, rows, inputs, group, offset=offset, dtype=scale_dtype))
        cubin = cuda_build.compile_cubin(lut_gpu.SOURCE, target, configuration(packed, columns, dtype))
        assert cubin[:4] == b"\x7fELF"
        assert b"hcx_lut_gemm" in cubin


@needs_nvcc
def test_the_table_kernel_does_not_spill_and_fits_shared_memory() -> None:
    for columns in (1, 4, 8):
        packed = pack(weight(2, 64, 256, 128, offset=True, dtype=torch.float16))
        options = [f"-D{name}={value}" for name, value in configuration(packed, columns, torch.bfloat16).items()]
        command = ["nvcc", "-cubin", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", *options]
        done = subprocess.run([*command, "-o", "/dev/null", str(ROOT / lut_gpu.SOURCE)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
        assert int(re.findall(r"(\d+) bytes smem", done.stderr)[0]) <= 48 * 1024


def test_a_broken_configuration_is_refused_with_the_compilers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda_build, "_nvrtc", lambda: None)
    with pytest.raises(KernelError, match="there is no CUDA compiler"):
        cuda_build.compile_cubin(lut_gpu.SOURCE, "90a", {})


@needs_nvcc
def test_a_source_that_does_not_compile_is_reported() -> None:
    with pytest.raises(KernelError, match=r"lut_gemm\.cu: nvcc fails: .*HCX_"):
        cuda_build.compile_cubin(lut_gpu.SOURCE, "90a", {"HCX_BITS": 1})


def test_the_table_backend_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec("cuda", 8, 4096, 2, 128, numerics="exact")
    backend = LutBackend()
    assert "runs on CUDA devices" in str(backend.why_not(replace(spec, device="cpu")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_not(spec) == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "groups of 100 inputs" in str(backend.why_not(replace(spec, group_size=100)))
    monkeypatch.setattr(cuda_build, "why_no_compiler", lambda: "no compiler")
    assert backend.why_not(spec) == "no compiler"


def test_a_wrong_input_is_refused_in_words_and_a_large_batch_needs_no_gpu() -> None:
    packed = weight(2, 5, 64, 32, offset=False, dtype=torch.float16)
    ready = pack(packed)
    with pytest.raises(KernelError, match="the input has 65 features, the weight takes 64"):
        LutBackend().matmul(torch.zeros(1, 65), ready)
    with pytest.raises(KernelError, match="the GPU kernels take fp16, bf16 and fp32"):
        LutBackend().matmul(torch.zeros(1, 64, dtype=torch.float64), ready)
    with pytest.raises(KernelError, match="the input is on meta"):
        LutBackend().matmul(torch.zeros(1, 64, device="meta"), ready)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LutBackend().matmul(x, ready), x @ packed.dequantize().t())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"q{case[0]}-g{case[3]}-n{case[4]}")
def test_the_gpu_gives_what_the_host_gives(case: tuple) -> None:
    bits, rows, inputs, group, columns, offset, scale_dtype, _ = case
    packed = weight(bits, rows, inputs, group, offset=offset, dtype=scale_dtype)
    x = torch.randn(columns, inputs, generator=torch.Generator().manual_seed(1))
    found = LutBackend().matmul(x.cuda(), LutBackend().prepack(packed.to("cuda"))).cpu()
    expected = x.double() @ packed.dequantize().double().t()
    assert float((found - expected).norm() / expected.norm()) <= SUMS
