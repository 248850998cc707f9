"""Binary-coding quantization: never worse than greedy, published error levels, exact uniform conversion."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcx.compress import from_uniform, quantize, quantize_uniform
from hcx.compress.bcq import SCALE_DTYPES
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight


def _tensor(kind: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "heavy tails":
        return weight * torch.exp(1.5 * torch.randn(rows, columns, generator=generator))
    if kind == "shifted":
        return weight + 3
    if kind == "outlier columns":  # what trained transformers show: a few inputs with far larger weights, low rank
        weight[:, :: max(columns // 4, 1)] *= 12
        return weight * 0.02 + 0.05 * torch.outer(torch.randn(rows, generator=generator), weight[0])
    if kind == "few values":
        return weight.round()
    if kind == "constant":
        return torch.full((rows, columns), 0.7)
    if kind == "zero":
        return torch.zeros(rows, columns)
    if kind == "tiny":
        return weight * 1e-4
    return weight


KINDS = ("normal", "heavy tails", "outlier columns", "shifted", "few values", "constant", "zero", "tiny")


def _error(packed: PackedWeight, weight: torch.Tensor) -> float:
    return float((packed.dequantize() - weight).double().square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_alternating_is_never_worse_than_greedy(kind: str, offset: bool, dtype: str) -> None:
    weight = _tensor(kind, 12, 100)
    for bits in (1, 2, 3, 4):
        settings_ = {"offset": offset, "scale_dtype": SCALE_DTYPES[dtype]}
        greedy = _error(quantize(weight, bits, 32, "greedy", **settings_), weight)
        alternating = _error(quantize(weight, bits, 32, "alternating", **settings_), weight)
        assert alternating <= greedy * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 90),
    bits=st.integers(1, 5),
    group=st.integers(1, 100),
    seed=st.integers(0, 100),
)
def test_any_shape_and_group_works_and_scales_come_coarsest_first(
    kind: str, rows: int, columns: int, bits: int, group: int, seed: int
) -> None:
    weight = _tensor(kind, rows, columns, seed)
    packed = quantize(weight, bits, group, rounds=3)
    assert (packed.out_features, packed.in_features, packed.bits) == (rows, columns, bits)
    assert packed.scales.dtype == torch.float16
    assert bool((packed.scales.float().abs().diff(dim=0) <= 0).all())
    assert torch.isfinite(packed.dequantize()).all()
    greedy = _error(quantize(weight, bits, group, "greedy"), weight)
    assert _error(packed, weight) <= greedy * (1 + 1e-6) + 1e-12


def test_errors_on_normal_weights_keep_to_the_known_levels() -> None:
    """Normalised squared errors of N(0, 1), groups of 128, measured apart: greedy, and alternation started from it."""
    weight = _tensor("normal", 256, 1024, seed=3)
    norm = float(weight.square().sum())
    known = {1: (0.360, 0.360), 2: (0.128, 0.113), 3: (0.0564, 0.0346), 4: (0.0312, 0.0107)}
    for bits, (greedy, alternating) in known.items():
        assert _error(quantize(weight, bits, 128, "greedy"), weight) / norm == pytest.approx(greedy, rel=0.03)
        found = _error(quantize(weight, bits, 128), weight) / norm
        # From 3 bits on there is a second start, which can only help; the rate-distortion bound stays out of reach.
        assert 4.0**-bits < found < alternating * 1.02


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outlier columns"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_alternating_with_an_offset_is_not_worse_than_rounding_to_nearest(kind: str, bits: int) -> None:
    weight = _tensor(kind, 32, 256)
    nearest = _error(quantize_uniform(weight, bits, 128), weight)
    assert _error(quantize(weight, bits, 128, offset=True), weight) < nearest


def test_tiny_groups_come_near_the_optimum_over_all_codes() -> None:
    """Two planes for 6 weights, against every one of the 2^12 codes with scales solved by another library routine."""
    groups = _tensor("heavy tails", 8, 6, seed=5)
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)))
    pairs = torch.stack([codes.repeat_interleave(64, 0), codes.repeat(64, 1)], dim=2)  # [4096, 6, 2]
    optimum = torch.stack(
        [(group - torch.einsum("cgi,ci->cg", pairs, _lstsq(pairs, group))).square().sum(1).min() for group in groups]
    ).double()
    packed = quantize(groups, 2, 6, scale_dtype=torch.float32)
    found = (packed.dequantize() - groups).double().square().sum(1)
    greedy = (
        (quantize(groups, 2, 6, "greedy", scale_dtype=torch.float32).dequantize() - groups).double().square().sum(1)
    )
    assert (found >= optimum - 1e-5 * groups.square().sum(1)).all()
    assert float(found.sum() - optimum.sum()) < 0.5 * float(greedy.sum() - optimum.sum())


def _lstsq(pairs: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    inverse = torch.linalg.pinv(pairs, rtol=1e-5)
    return inverse @ group


def test_scales_are_least_squares_for_their_codes() -> None:
    weight = _tensor("normal", 6, 64)
    packed = quantize(weight, 3, 64, scale_dtype=torch.float32)
    signs = packed.signs()
    for row in range(6):
        best = torch.linalg.lstsq(signs[:, row].t(), weight[row][:, None]).solution[:, 0]
        torch.testing.assert_close(packed.scales[:, row, 0], best, rtol=1e-4, atol=1e-5)


def test_every_code_is_the_nearest_for_its_scales() -> None:
    weight = _tensor("heavy tails", 4, 96)
    packed = quantize(weight, 4, 32, scale_dtype=torch.bfloat16)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))
    for column in range(96):
        levels = packed.scales[:, :, column // 32].float().t() @ signs.t()
        best = (levels - weight[:, column : column + 1]).abs().amin(1)
        reached = (packed.dequantize()[:, column] - weight[:, column]).abs()
        torch.testing.assert_close(reached, best, rtol=1e-5, atol=1e-6)


def test_rounds_after_the_codes_have_settled_change_nothing() -> None:
    weight = _tensor("normal", 16, 128)
    settled, longer = quantize(weight, 2, 64, rounds=200), quantize(weight, 2, 64, rounds=400)
    assert torch.equal(settled.planes, longer.planes)
    assert torch.equal(settled.scales, longer.scales)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from hcx.compress import bcq

    weight = _tensor("heavy tails", 16, 100)
    whole = quantize(weight, 3, 32, offset=True)
    monkeypatch.setattr(bcq, "CHUNK_VALUES", 7 * 32)
    pieces = quantize(weight, 3, 32, offset=True)
    assert torch.equal(whole.planes, pieces.planes)
    torch.testing.assert_close(whole.dequantize(), pieces.dequantize(), rtol=1e-5, atol=1e-6)


def test_one_plane_reaches_the_optimum_of_a_sign_code() -> None:
    weight = _tensor("normal", 64, 4096)
    error = _error(quantize(weight, 1, 4096, scale_dtype=torch.float32), weight) / float(weight.square().sum())
    assert error == pytest.approx(1 - 2 / math.pi, abs=2e-3)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outlier columns", "shifted"])
@pytest.mark.parametrize("method", ["greedy", "alternating"])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_the_error_falls_with_every_bit(kind: str, method: str, dtype: str) -> None:
    weight = _tensor(kind, 16, 256)
    bits = range(1, 9 if method == "alternating" else 7)
    errors = [_error(quantize(weight, q, 64, method, scale_dtype=SCALE_DTYPES[dtype]), weight) for q in bits]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_an_offset_removes_a_constant() -> None:
    weight = _tensor("shifted", 16, 128)
    assert _error(quantize(weight, 2, 64, offset=True), weight) < 0.3 * _error(quantize(weight, 2, 64), weight)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "tiny", "constant", "zero"])
def test_rounding_to_nearest_moves_no_weight_by_more_than_half_a_step(bits: int, dtype: str, kind: str) -> None:
    weight = _tensor(kind, 8, 100)
    packed = quantize_uniform(weight, bits, 32, SCALE_DTYPES[dtype])
    half = packed.scales[-1].float()[:, torch.arange(100) // 32]
    assert ((packed.dequantize() - weight).abs() <= half * (1 + 1e-4) + 1e-6 * weight.abs().max()).all()
    # Grids are tight: the step is the range over the levels, rounded up by less than a unit in the last place.
    groups = weight[:, :96].unflatten(1, (3, 32))
    exact = (groups.amax(2) - groups.amin(2)) / 2 / (2**bits - 1)
    smallest = 2.0**-24 if dtype == "fp16" else 0.0
    assert (packed.scales[-1, :, :3].float() <= exact * (1 + 2.0**-7) + smallest).all()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    group=st.integers(1, 80),
    halves=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_a_uniform_weight_becomes_planes_bit_for_bit(
    bits: int, rows: int, columns: int, group: int, halves: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    groups = -(-columns // group)
    step = (torch.rand(rows, groups, generator=generator) + 0.01).to(dtype)
    zero = torch.randint(0, 1 << bits, (rows, groups), generator=generator).float() + (0.5 if halves else 0.0)
    packed = from_uniform(codes, step, zero, bits, group, dtype)
    where = torch.arange(columns) // group
    expected = step.float()[:, where] * (codes.float() - zero[:, where])
    assert torch.equal(packed.dequantize(), expected)


def test_uniform_steps_that_the_scales_cannot_hold_are_refused() -> None:
    codes, zero = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 1)
    with pytest.raises(ConfigError, match="scale_dtype: fp32"):
        from_uniform(codes, torch.full((2, 1), 1 / 3), zero, 4, 8)
    with pytest.raises(ConfigError, match="4 bits hold 0 to 15"):
        from_uniform(codes + 16, zero + 1, zero, 4, 8)
    with pytest.raises(ConfigError, match=r"expected \(2, 2\)"):
        from_uniform(codes, zero + 1, zero, 4, 4)


def test_bad_arguments_say_what_is_allowed() -> None:
    weight = torch.randn(4, 16)
    for bits, group, pattern in ((0, 8, "bits = 0"), (9, 8, "1 to 8"), (4, 0, "group_size = 0")):
        with pytest.raises(ConfigError, match=pattern):
            quantize(weight, bits, group)
    with pytest.raises(ConfigError, match="not finite"):
        quantize(torch.full((2, 8), float("nan")), 2, 8)
    with pytest.raises(ConfigError, match="not finite"):
        quantize_uniform(torch.full((2, 8), float("inf")), 2, 8)
    with pytest.raises(ConfigError, match=r"expected \[out, in\]"):
        quantize(torch.zeros(4), 2, 8)
    with pytest.raises(ConfigError, match="rounds = -1"):
        quantize(weight, 2, 8, rounds=-1)
    with pytest.raises(ConfigError, match="overflows"):
        quantize(weight * 1e6, 2, 8)
    with pytest.raises(ConfigError, match="method"):
        quantize(weight, 2, 8, "nearest")  # type: ignore[arg-type]
