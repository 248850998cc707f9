"""The native library from Python: exact unpacking, errors within bounds over the whole domain, refusals not crashes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import PackedWeight, native
from hcx.testing.packed import random_packed

pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")

ISAS = ("portable", "avx2", "avx512")
SEGMENT = 128
"""Inputs that share a table scale, or a scale of activations."""
FP32_SLACK = 1e-5
"""Relative to the sum of magnitudes: rounding of a few hundred fp32 additions."""
TYPICAL = {"tables8": (4e-3, 1.0e-2), "codes8": (4e-3, 1.2e-2), "tables15": (2e-5, 1e-4)}
"""Relative error of normal inputs, groups of 128: below the lower end something else was computed."""
BIQGEMM_ERROR = 5e-7
"""Relative error of fp32 tables and sums of some hundred inputs."""

DOMAIN = st.tuples(
    st.integers(1, 8),  # bits
    st.integers(1, 150),  # outputs
    st.integers(1, 520),  # inputs
    st.integers(0, 6),  # group in units of 32; 0: the whole row
)


def weight_of(shape: tuple[int, int, int, int], **options: object) -> PackedWeight:
    bits, rows, columns, units = shape
    return random_packed(bits, rows, columns, 32 * units or columns, **options)  # type: ignore[arg-type]


def error_bound(weight: PackedWeight, x: Tensor, method: str) -> Tensor:
    """What no result may exceed: `[batch, out]`, from the rounding of tables or of activations and scales."""
    bound = torch.zeros(x.shape[0], weight.out_features, dtype=torch.float64)
    scales = weight.scales.double().abs().sum(0)
    for group in range(weight.num_groups):
        begin = group * weight.group_size
        end = min(begin + weight.group_size, weight.in_features)
        for first in range(begin, end, SEGMENT):
            part = x[:, first : min(first + SEGMENT, end)].double().abs()
            part = torch.nn.functional.pad(part, (0, -part.shape[1] % 4))
            if method == "codes8":
                unit = part.amax(1) / 127
                # Half a unit per activation; a quarter of a step per plane and input.
                step = 2 * scales[:, group] / (255 - weight.bits / 2)
                bound += torch.outer(unit / 2 * part.shape[1], scales[:, group] + weight.bits * step)
                bound += torch.outer(part.sum(1), weight.bits * step / 4)
            else:
                tables = part.unflatten(1, (-1, 4)).sum(2)
                unit = tables.amax(1) / {"tables8": 127, "tables15": 16383}[method]
                bound += torch.outer(unit / 2 * tables.shape[1], scales[:, group])
    magnitude = scales + (0 if weight.offset is None else weight.offset.double().abs())
    dense = magnitude.repeat_interleave(weight.group_size, 1)[:, : weight.in_features]
    return bound * (1 + FP32_SLACK) + FP32_SLACK * (x.double().abs() @ dense.t())


@settings(max_examples=60, deadline=None)
@given(
    DOMAIN,
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(0, 999),
)
def test_unpacking_gives_the_reference_weight_bit_for_bit(
    shape: tuple[int, int, int, int], offset: bool, dtype: torch.dtype, seed: int
) -> None:
    weight = weight_of(shape, offset=offset, dtype=dtype, seed=seed)
    packed = native.pack(weight)
    assert torch.equal(native.dequantize(packed.data, *packed_shape(weight)), weight.dequantize())


def packed_shape(weight: PackedWeight) -> tuple[int, int]:
    return weight.out_features, weight.in_features


@settings(max_examples=80, deadline=None)
@given(
    DOMAIN,
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from(list(TYPICAL)),
    st.integers(0, 999),
)
def test_errors_stay_within_their_bound_and_every_path_gives_the_same_bits(
    shape: tuple[int, int, int, int], batch: int, offset: bool, dtype: torch.dtype, method: str, seed: int
) -> None:
    weight = weight_of(shape, offset=offset, dtype=dtype, seed=seed)
    packed = native.pack(weight)
    x = torch.randn(batch, weight.in_features, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 20.0  # an outlier
    found = native.matmul(x, packed.handle, *packed_shape(weight), method, "portable", 1)
    exact = x.double() @ weight.dequantize(torch.float64).t()
    assert ((found - exact).abs() <= error_bound(weight, x, method)).all()
    for isa in ISAS:
        for threads in (1, 3):
            assert torch.equal(found, native.matmul(x, packed.handle, *packed_shape(weight), method, isa, threads))
    assert torch.equal(found[-1:], native.matmul(x[-1:], packed.handle, *packed_shape(weight), method))


@settings(max_examples=40, deadline=None)
@given(DOMAIN, st.integers(1, 5), st.booleans(), st.integers(0, 999))
def test_biqgemm_agrees_with_float64_for_any_shape_and_thread_count(
    shape: tuple[int, int, int, int], batch: int, offset: bool, seed: int
) -> None:
    weight = weight_of(shape, offset=offset, seed=seed)
    packed = native.pack(weight, "biqgemm")
    x = torch.randn(batch, weight.in_features, generator=torch.Generator().manual_seed(seed))
    found = native.biqgemm(x, packed, threads=1)
    dense = weight.dequantize(torch.float64)
    magnitude = weight.scales.double().abs().sum(0) + (0 if weight.offset is None else weight.offset.double().abs())
    size = x.double().abs() @ magnitude.repeat_interleave(weight.group_size, 1)[:, : weight.in_features].t()
    assert ((found - x.double() @ dense.t()).abs() <= FP32_SLACK * size).all()
    assert torch.equal(found, native.biqgemm(x, packed, threads=3))


@pytest.mark.parametrize("method", list(TYPICAL))
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_relative_error_of_normal_inputs_is_that_of_the_numerics_class(method: str, bits: int) -> None:
    weight = random_packed(bits, 256, 1024, 128)
    x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ weight.dequantize(torch.float64).t()
    error = (native.matmul(x, native.pack(weight).handle, 256, 1024, method) - exact).norm() / exact.norm()
    low, high = TYPICAL[method]
    assert low < error < high


def test_biqgemm_tables_come_from_the_direct_product() -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    patterns = 2.0 * ((torch.arange(256)[:, None] >> torch.arange(8)) & 1) - 1
    table = native.table_of(x)
    torch.testing.assert_close(table.double(), patterns.double() @ x.double(), rtol=0, atol=4e-6)  # 8 fp32 additions
    assert torch.equal(table.flip(0), -table)
    whole = torch.randint(-15, 16, (8,)).float()
    assert torch.equal(native.table_of(whole), patterns @ whole)
    weight = random_packed(3, 100, 700, 100 * 7)
    rows = torch.randn(4, 700)
    exact = rows.double() @ weight.dequantize(torch.float64).t()
    assert (native.biqgemm(rows, native.pack(weight, "biqgemm")) - exact).norm() < BIQGEMM_ERROR * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_float_type_and_layout_are_taken(dtype: torch.dtype) -> None:
    weight = random_packed(2, 40, 96, 32)
    handle = native.pack(weight).handle
    x = torch.randn(96, 6).t().view(2, 3, 96).to(dtype)  # rows are not contiguous
    found = native.matmul(x, handle, 40, 96, "tables15")
    assert found.shape == (2, 3, 40)
    assert found.dtype == dtype
    assert torch.equal(found, native.matmul(x.float().contiguous(), handle, 40, 96, "tables15").to(dtype))
    assert native.matmul(torch.empty(0, 96), handle, 40, 96).shape == (0, 40)


def test_wrong_inputs_are_refused_with_what_was_expected() -> None:
    packed = native.pack(random_packed(2, 40, 96, 32))
    with pytest.raises(KernelError, match=r"float32 \(3, 95\).*expected floating point \[\.\.\., 96\]"):
        native.matmul(torch.ones(3, 95), packed.handle, 40, 96)
    with pytest.raises(KernelError, match="int64"):
        native.matmul(torch.ones(3, 96, dtype=torch.int64), packed.handle, 40, 96)
    with pytest.raises(KernelError, match="method = 'tables9'; did you mean"):
        native.matmul(torch.ones(3, 96), packed.handle, 40, 96, "tables9")
    with pytest.raises(KernelError, match="isa = 'sse'"):
        native.matmul(torch.ones(3, 96), packed.handle, 40, 96, isa="sse")
    with pytest.raises(KernelError, match="multiple of 32"):
        native.pack(random_packed(2, 8, 96, 24))
    with pytest.raises(KernelError, match="wrong size"):
        native.set_scales(packed.data, torch.ones(2, 40, 2, dtype=torch.float16), torch.ones(40, 3))
    with pytest.raises(KernelError, match="wrong size"):
        native.dequantize(packed.data, 40, 64)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_buffers_are_refused_and_never_crash(data: st.DataObject) -> None:
    packed = native.pack(random_packed(3, 50, 200, 64)).data
    kind = data.draw(st.sampled_from(["header", "size", "alignment", "noise"]))
    # As much memory behind as could be asked for: what is read of a wrong buffer must be decided by its header.
    memory = native.aligned_empty(packed.numel() + 128)
    memory[: packed.numel()] = packed
    begin, length = 0, packed.numel()
    if kind == "header":
        at = data.draw(st.integers(0, 63))
        memory[at] = int(memory[at]) ^ data.draw(st.integers(1, 255))
    elif kind == "size":
        length = data.draw(st.integers(0, packed.numel() + 128).filter(lambda size: size != packed.numel()))
    elif kind == "alignment":
        begin = data.draw(st.integers(1, 63))
    else:
        noise = data.draw(st.binary(min_size=64, max_size=64))
        memory[:64] = torch.frombuffer(bytearray(noise), dtype=torch.uint8)
    damaged = memory[begin : begin + length]
    for refused in (
        lambda: native.matmul(torch.ones(1, 200), native.handle_of([damaged]), 50, 200),
        lambda: native.dequantize(damaged, 50, 200),
        lambda: native.set_scales(damaged, torch.ones(3, 50, 4, dtype=torch.float16), torch.ones(50, 4)),
    ):
        with pytest.raises(KernelError, match=r"wrong size|misaligned|header|null"):
            refused()


def test_reading_returns_the_exclusive_or_of_all_words() -> None:
    data = native.aligned_empty(100_008)
    data.random_(generator=torch.Generator().manual_seed(0))
    expected = 0
    for word in data.view(torch.int64).tolist():
        expected ^= word & (2**64 - 1)
    assert native.read_floor(data) == native.read_floor(data, threads=3) == expected


def test_the_structures_of_the_interface_have_the_sizes_of_the_header() -> None:
    # Three int64 and four int32; a pointer and an int64.
    assert ctypes.sizeof(native._Shape) == 40
    assert ctypes.sizeof(native._Weight) == 16


SCRIPT = """
import torch
from hcx.errors import KernelError
from hcx.kernels import Spec, backends, native, select
from hcx.testing.packed import random_packed
weight = random_packed(2, 8, 64, 32)
print(native.why_absent())
print(select(Spec.of(weight, "fast")).name)
try:
    select(Spec.of(weight, "fast"), kernel="cpu-fast")
except KernelError as error:
    print(error)
"""


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_a_usable_library_the_reference_serves_and_the_reason_is_given(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "libhcx_kernels.so"
    if content is not None:
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"PATH": "", "HCX_KERNELS_LIBRARY": str(path), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    why, name, refused = done.stdout.splitlines()
    assert str(path) in why
    assert name == "reference"
    assert "cannot serve" in refused
    assert why in refused
    assert done.stderr.count(why) == 1  # said once for all kernels that it concerns
