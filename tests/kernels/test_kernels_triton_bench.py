"""The GPU benchmark as far as it goes without a GPU: its contenders are right, its rows complete, its refusal clear."""

from __future__ import annotations

import pytest
import torch

from hcx.errors import KernelError
from hcx.kernels import bench_gpu
from hcx.kernels.bench_gpu import GpuCase, GpuContender, cases, copies_of, cublas, measure, ours, relative_error, row

pytest.importorskip("triton", reason="the package triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES = {"fast": 5e-3, "exact": 3e-3, "bf16": 3e-3}
"""Relative L2 error with bf16 activations: 1.7e-3 is the rounding of the output; `fast` rounds levels to bf16 too."""

with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    import hcx.kernels.triton.ops  # noqa: F401
    from hcx.kernels.triton.read import read


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_refuses_with_the_reason() -> None:
    with pytest.raises(KernelError, match="cannot be timed on a GPU: no CUDA device"):
        measure(GpuCase(64, 128, 1))


def test_every_contender_multiplies_its_own_weights_with_every_copy() -> None:
    case = GpuCase(20, 256, 1, (2, 3))
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    contenders = [*ours(case, x, 1), *cublas(case, x, 1)]
    assert {(c.kernel, c.bits) for c in contenders if c.kernel != "lut"} == {
        ("triton", 2), ("triton", 3), ("triton-exact", 2), ("triton-exact", 3), ("cublas-bf16", 16),
    }  # fmt: skip
    for contender in contenders:
        assert relative_error(contender) <= CLASSES[contender.numerics]
        assert len({memory.data_ptr() for memory in contender.memory}) == len(contender.memory) == 2
        assert torch.equal(contender.run(1), contender.run(0))


def test_copies_exceed_the_footprint_and_are_never_one() -> None:
    assert copies_of(100, 250) == 3
    assert copies_of(1000, 250) == 2


def test_a_row_has_the_columns_of_the_design_and_scales_the_floor_to_all_bytes() -> None:
    memory = [torch.zeros(25, dtype=torch.int32)] * 2  # 100 bytes of codes, 110 with scales
    contender = GpuContender("triton", 3, 128, "fast", memory, lambda copy: memory[copy], memory[0], 110)
    found = row(GpuCase(8, 128, 4), contender, 1.2345e-3, [4.0] * 98 + [2.0, 9.0], [1.0] * 100).as_dict()
    columns = "kernel device out in bits group batch threads numerics us_p2 us_p50 floor_us_p2 relative_error"
    assert set(columns.split()) <= set(found)
    assert (found["us_p50"], found["us_p2"], found["relative_error"]) == (4.0, 4.0, 0.00123)
    assert (found["floor_us_p2"], found["of_floor"]) == (1.1, 0.275)


def test_the_table_of_the_specification_is_covered() -> None:
    found = cases(quick=False)
    assert {(c.out_features, c.in_features) for c in found} == {
        (4096, 4096), (14336, 4096), (28672, 8192), (49152, 12288),
    }  # fmt: skip
    assert {c.batch for c in found} >= {1, 8, 256}
    assert all(c.bits == (1, 2, 3, 4) for c in found)
    assert set(bench_gpu.PEERS) == {"cublas-bf16", "torch-int4", "gemlite"}


def test_the_floor_reads_every_word() -> None:
    memory = torch.zeros(3 * 8192 + 5, dtype=torch.int32, device=DEVICE)
    for place in (0, 8191, 8192, 3 * 8192 + 4):
        memory.zero_()
        memory[place] = 1 << 20
        assert read(memory).sum() == 1 << 20


@pytest.mark.gpu
def test_a_case_is_measured_on_the_gpu() -> None:
    outcome = measure(GpuCase(4096, 4096, 1, (3,)), turns=20)
    assert "ours" not in outcome.left_out
    assert all(0 < found.of_floor < 1.1 for found in outcome.rows if found.kernel == "triton")
