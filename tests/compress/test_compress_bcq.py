"""Binary-coding quantization: never worse than greedy, published error levels, exact uniform conversion."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcx.compress import quantize, quantize_uniform
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
    if kind == "few values":
        return weight.round()
    if kind == "constant":
        return torch.full((rows, columns), 0.7)
    if kind == "zero":
        return torch.zeros(rows, columns)
    if kind == "tiny":
        return weight * 1e-4
    return weight


KINDS = ("normal", "heavy tails", "shifted", "few values", "constant", "zero", "tiny")


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
    assert bool((packed.scales.float().diff(dim=0) <= 0).all())
    assert torch.isfinite(packed.dequantize()).all()
    greedy = _error(quantize(weight, bits, group, "greedy"), weight)
    assert _error(packed, weight) <= greedy * (1 + 1e-6) + 1e-12


def test_errors_on_normal_weights_equal_the_known_levels() -> None:
    """Normalised squared errors of N(0, 1), groups of 128: greedy and 15 rounds of alternation, measured apart."""
    weight = _tensor("normal", 256, 1024, seed=3)
    known = {1: (0.360, 0.360), 2: (0.128, 0.113), 3: (0.0564, 0.0346), 4: (0.0312, 0.0107)}
    for bits, (greedy, alternating) in known.items():
        norm = float(weight.square().sum())
        assert _error(quantize(weight, bits, 128, "greedy"), weight) / norm == pytest.approx(greedy, rel=0.03)
        assert _error(quantize(weight, bits, 128), weight) / norm == pytest.approx(alternating, rel=0.03)


def test_one_plane_reaches_the_optimum_of_a_sign_code() -> None:
    weight = _tensor("normal", 64, 4096)
    error = _error(quantize(weight, 1, 4096, scale_dtype=torch.float32), weight) / float(weight.square().sum())
    assert error == pytest.approx(1 - 2 / math.pi, abs=2e-3)


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_the_error_falls_with_every_bit(kind: str) -> None:
    weight = _tensor(kind, 64, 256)
    errors = [_error(quantize(weight, bits, 64), weight) for bits in range(1, 7)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_an_offset_removes_a_constant() -> None:
    weight = _tensor("shifted", 16, 128)
    assert _error(quantize(weight, 2, 64, offset=True), weight) < 0.3 * _error(quantize(weight, 2, 64), weight)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_uniform_codes_become_planes_exactly(bits: int, dtype: str) -> None:
    weight = _tensor("normal", 8, 100)
    packed = quantize_uniform(weight, bits, 32, SCALE_DTYPES[dtype])
    assert packed.offset is not None
    signs = (packed.signs(torch.float64) + 1) / 2
    levels = sum(signs[plane] * 2 ** (bits - 1 - plane) for plane in range(bits))
    groups = torch.arange(100) // 32
    step = 2.0 * packed.scales[-1].double()[:, groups]
    base = packed.offset.double()[:, groups] - packed.scales.double().sum(0)[:, groups]
    exact = step * levels + base
    assert (packed.dequantize().double() - exact).abs().max() < 1e-6 * weight.abs().max()
    # Rounding to nearest: within half a step inside the range (rounding the step may cut the range's ends).
    inside = (weight.double() - base >= 0) & (weight.double() <= base + step * (2**bits - 1))
    assert ((exact - weight.double()).abs()[inside] <= step[inside] / 2 + 1e-6).all()


def test_bad_arguments_say_what_is_allowed() -> None:
    weight = torch.randn(4, 16)
    for bits, group, pattern in ((0, 8, "bits = 0"), (9, 8, "1 to 8"), (4, 0, "group_size = 0")):
        with pytest.raises(ConfigError, match=pattern):
            quantize(weight, bits, group)
    with pytest.raises(ConfigError, match="not finite"):
        quantize(torch.full((2, 8), float("nan")), 2, 8)
    with pytest.raises(ConfigError, match="overflows"):
        quantize(weight * 1e6, 2, 8)
    with pytest.raises(ConfigError, match="method"):
        quantize(weight, 2, 8, "nearest")  # type: ignore[arg-type]
