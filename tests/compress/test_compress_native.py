"""The native coder beside its reference in torch: the same errors, and the same codes but for ties and last bits."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from hcx.compress import bcq, feedback
from hcx.compress.bcq import SCALE_DTYPES, quantize_groups, quantize_groups_reference
from hcx.compress.codes import Codes
from hcx.compress.feedback import output_error, quantize_to_outputs
from hcx.compress.methods import GridOptions, find_method
from hcx.compress.nested import quantize_nested_to_outputs
from hcx.compress.plan import CompressPlan
from hcx.compress.run import compress_model
from hcx.compress.work import WorkDirectory
from hcx.errors import CheckpointError, KernelError
from hcx.kernels import coding, native
from hcx.testing.tiny import tiny_model_directory

pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bcq, "coder", lambda: "torch")
    monkeypatch.setattr(feedback, "coder", lambda: "torch")


def _groups(count: int, size: int, seed: int = 0) -> torch.Tensor:
    groups = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * 0.02
    groups[0], groups[1], groups[3] = 0.0, 0.01, groups[3] * 1e-6
    groups[2, 0] = 3.0
    groups[4] = groups[4].round(decimals=2)  # ties
    return groups


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("offset", "weighted"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("scale_dtype", list(SCALE_DTYPES))
def test_codes_have_the_error_of_the_reference_in_every_group(
    bits: int, offset: bool, weighted: bool, scale_dtype: str
) -> None:
    dtype = SCALE_DTYPES[scale_dtype]
    groups = _groups(80, 48)
    importance = torch.rand(80, 48, generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    found = quantize_groups(groups, bits, "alternating", 15, offset, dtype, importance)
    expected = quantize_groups_reference(groups, bits, "alternating", 15, offset, dtype, importance)
    greedy = quantize_groups_reference(groups, bits, "greedy", 0, offset, dtype, importance)
    assert found.patterns.dtype == torch.uint8
    assert torch.equal(found.scales, found.scales.to(dtype).float())
    assert bool((found.scales.diff(dim=1) <= 0).all())
    errors = [one.error(groups, importance) for one in (found, expected, greedy)]
    floor = groups.double().square().sum(1) * 1e-6  # errors below are those of fp32 itself
    assert bool((errors[0] <= errors[2] * (1 + 1e-6) + floor).all())
    # An alternation that meets a tie, or more levels than weights, may end elsewhere: as often better as worse.
    ordinary = slice(5, None)
    sums = [float(error[ordinary].sum()) for error in errors]
    assert sums[0] == pytest.approx(sums[1], rel=1e-3 if bits <= 4 else 0.1)
    if bits <= 4:
        apart = (errors[0] - errors[1]).abs() > 1e-3 * errors[1] + floor
        assert int(apart.sum()) <= 4
        assert float((found.patterns == expected.patterns).all(1).float().mean()) > 0.9


def test_codes_do_not_depend_on_threads_or_on_the_other_groups() -> None:
    groups = _groups(200, 64)
    whole = coding.alternate(groups, None, 3, 15, True, torch.float16, threads=1)
    shared = coding.alternate(groups, None, 3, 15, True, torch.float16, threads=3)
    parts = [coding.alternate(part, None, 3, 15, True, torch.float16) for part in groups.split(70)]
    for place, tensor in enumerate(whole):
        assert torch.equal(tensor, shared[place])
        assert torch.equal(tensor, torch.cat([part[place] for part in parts]))


@pytest.mark.parametrize(
    ("method", "bits", "act_order", "offset", "group_size", "nested"),
    [
        ("alternating", 3, False, False, 32, False),
        ("alternating", 2, True, True, 48, False),
        ("uniform", 4, False, True, 64, False),
        ("searched", 3, True, True, 32, False),
        ("greedy", 3, False, False, 100, False),
        ("alternating", 4, False, False, 64, True),
    ],
)
def test_feedback_and_descent_give_the_codes_of_the_loops_in_torch(
    method: str,
    bits: int,
    act_order: bool,
    offset: bool,
    group_size: int,
    nested: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 100, generator=generator) @ torch.randn(100, 100, generator=generator)
    weight, gram = torch.randn(40, 100, generator=generator) * 0.02, inputs.t() @ inputs / 400
    options = GridOptions(bits=bits, offset=offset)

    def quantized() -> tuple[torch.Tensor, float]:
        if nested:
            packed = quantize_nested_to_outputs(weight, gram, [2, 3, bits], find_method(method), options, group_size)
        else:
            packed = quantize_to_outputs(weight, gram, find_method(method), options, group_size, 6, act_order)
        return packed.dequantize(), output_error(weight, packed, gram)

    found, error = quantized()
    monkeypatch.setattr(bcq, "coder", lambda: "torch")
    monkeypatch.setattr(feedback, "coder", lambda: "torch")
    expected, other = quantized()
    assert error == pytest.approx(other, rel=1e-3)
    assert float(torch.isclose(found, expected, rtol=1e-3, atol=1e-6).float().mean()) > 0.95


def test_methods_without_alternation_and_other_devices_stay_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("native")

    monkeypatch.setattr(coding, "alternate", never)
    groups = _groups(8, 32)
    for method in ("greedy", "refined"):
        quantize_groups(groups, 2, method, 0, False, torch.float16)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="native"):
        quantize_groups(groups, 2, "alternating", 2, False, torch.float16)


def test_the_reference_serves_where_there_is_no_library(in_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = _groups(20, 32)
    expected = quantize_groups_reference(groups, 3, "alternating", 15, False, torch.float16)
    monkeypatch.setattr(coding, "alternate", None)
    found = quantize_groups(groups, 3, "alternating", 15, False, torch.float16)
    for name in ("patterns", "scales", "offsets"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_unfinished_work_of_the_other_coder_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes would not be those of a run that was never stopped."""
    source = tiny_model_directory(tmp_path / "model", with_tokenizer=False)
    plan = CompressPlan.model_validate({"default": {"bits": 2, "group_size": 32}})

    def stop(work: WorkDirectory, *arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(WorkDirectory, "finish", stop)
        patched.setattr("hcx.compress.run.coder", lambda: "torch")
        with pytest.raises(KeyboardInterrupt):
            compress_model(source, tmp_path / "out", plan)
    with pytest.raises(CheckpointError, match="another plan or model"):
        compress_model(source, tmp_path / "out", plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "1 to 8 planes"),
        ({"importance": torch.ones(3, 3)}, "importance of shape"),
        ({"rounds": -1}, "out of range"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    settings = {"importance": None, "bits": 2, "rounds": 15, "offset": False, "scale_dtype": torch.float16, **change}
    with pytest.raises(KernelError, match=message):
        coding.alternate(torch.zeros(2, 8), **settings)  # type: ignore[arg-type]


def test_tensors_that_are_not_laid_out_as_expected_are_refused() -> None:
    codes = Codes(torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 2, 2), torch.zeros(4, 2))
    grids = coding.Grids(codes.scales, codes.offsets, codes.patterns, 4)
    gram, pull = torch.eye(8), torch.zeros(4, 8)
    coding.choose_codes(grids, gram, pull, 0, 8)
    for bad in (gram.double(), torch.eye(9)[:8, :8], torch.eye(7)):
        with pytest.raises(KernelError, match="expected torch"):
            coding.choose_codes(grids, bad, pull, 0, 8)
    with pytest.raises(KernelError, match="expected torch"):
        coding.choose_codes(coding.Grids(codes.scales[:, :1], codes.offsets, codes.patterns, 4), gram, pull, 0, 8)
    with pytest.raises(KernelError, match="expected torch"):
        coding.feed_back(grids, torch.arange(8, dtype=torch.int32), gram, pull, 0, 8)
