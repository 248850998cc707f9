"""The exact properties that specs of LUT-GEMM and BCQ ask for, by their names there: L1 to L6.

L2 (bytes) is in `tests/kernels/test_kernels_format.py` and L5, L7 and L8 (tables, determinism, GPU) are in
`tests/kernels`; what concerns the quantizers is here, and L3 and L4 for what the quantizers make.
"""

from __future__ import annotations

import math

import pytest
import torch

from hcx.compress import from_uniform, quantize, quantize_uniform, search_uniform
from hcx.compress.bcq import split_importance
from hcx.compress.codes import Codes, least_squares, nearest
from hcx.compress.methods import ELSEWHERE, METHODS, GridOptions, find_method
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight, Spec, select
from hcx.kernels.format import pack_signs


def _normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 48, 96])
def test_l1_a_uniform_grid_becomes_planes_bit_for_bit(
    bits: int, dtype: torch.dtype, symmetric: bool, group: int
) -> None:
    """Constant groups (step 0), all-equal rows and outlier rows included."""
    weight = _normal(8, 96, bits)
    weight[1] = 0.0
    weight[2] = -0.3
    weight[3, 7] = 300.0
    groups = weight.view(8, -1, group)
    top = 2**bits - 1
    if symmetric:
        step = (groups.abs().amax(2) / (2 ** (bits - 1) - 1 or 1)).to(dtype).float()
        zero = torch.full_like(step, 2.0 ** (bits - 1))
    else:
        step = ((groups.amax(2) - groups.amin(2)) / top).to(dtype).float()
        safe = torch.where(step > 0, step, 1.0)
        zero = (-groups.amin(2) / safe).round().clamp(-(2**15), 2**15)
    safe = torch.where(step > 0, step, 1.0)
    codes = (groups / safe[:, :, None] + zero[:, :, None]).round().clamp(0, top)
    expected = (step[:, :, None] * (codes - zero[:, :, None])).flatten(1)
    packed = from_uniform(codes.flatten(1).long(), step, zero, bits, group, dtype)
    if float(zero.abs().max()) < 2**11:
        assert torch.equal(packed.dequantize(), expected)
    else:
        # A zero point beyond 11 bits times an 11-bit step needs more than fp32's 24 bits.
        torch.testing.assert_close(packed.dequantize(), expected, rtol=2**-22, atol=0)


def test_l1_both_uniform_quantizers_make_exact_grids() -> None:
    """Levels are evenly spaced in exact arithmetic: every plane's scale is twice the next one's, to the bit."""
    weight = _normal(16, 100)
    for packed in (quantize_uniform(weight, 4, 32), search_uniform(weight, 4, 32)):
        assert packed.offset is not None
        for plane in range(3):
            assert torch.equal(packed.scales[plane], 2 * packed.scales[plane + 1])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_l3_products_of_integers_are_exact_in_any_order_of_summation(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    planes = pack_signs(torch.rand(bits, 24, 100, generator=generator) < 0.5)
    powers = 2.0 ** torch.randint(-3, 3, (bits, 24, 4), generator=generator).float()
    packed = PackedWeight(planes, powers.half(), None, 100, 32)
    x = torch.randint(-15, 16, (3, 100), generator=generator).float()
    expected = x.double() @ packed.dequantize().double().t()
    backend = select(Spec.of(packed))
    assert torch.equal(backend.matmul(x, backend.prepack(packed)).double(), expected)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_l4_products_stay_within_fp32_rounding_of_the_sum_of_magnitudes(method: str) -> None:
    weight = _normal(16, 96)
    packed = quantize(weight, 3, 32) if method == "alternating" else _plain(method, weight)
    x = _normal(2, 96, 5)
    backend = select(Spec.of(packed))
    found = backend.matmul(x, backend.prepack(packed)).double()
    magnitude = x.abs().double() @ packed.dequantize().abs().double().t()
    assert ((found - x.double() @ packed.dequantize().double().t()).abs() <= 96 * 2.0**-24 * magnitude).all()


def _plain(method: str, weight: torch.Tensor) -> PackedWeight:
    if method == "uniform":
        return quantize_uniform(weight, 3, 32)
    return search_uniform(weight, 3, 32) if method == "searched" else quantize(weight, 3, 32, method)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_l6_no_half_step_of_alternation_raises_the_error(offset: bool, weighted: bool) -> None:
    groups = _normal(64, 64)
    importance = torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) + 0.01 if weighted else None
    codes = METHODS["greedy"].choose(groups, GridOptions(3, offset=offset, scale_dtype=torch.float32), importance)
    error = codes.error(groups, importance)
    for _ in range(15):
        codes = Codes(codes.patterns, *least_squares(groups, codes.patterns, 3, offset, importance))
        after = codes.error(groups, importance)
        assert (after <= error * (1 + 1e-5)).all()
        codes = nearest(groups, codes.scales, codes.offsets)
        error = codes.error(groups, importance)
        assert (error <= after * (1 + 1e-5)).all()


def test_l6_errors_on_normal_weights_are_those_of_the_specification() -> None:
    """Its table for groups of 128: greedy, refined greedy, alternation with an offset, each within 2 to 3 %."""
    weight = _normal(128, 1024, 3)
    norm = float(weight.square().sum())

    def error(packed: PackedWeight) -> float:
        return float((packed.dequantize() - weight).double().square().sum()) / norm

    table = {2: (0.128, 0.122, 0.108), 3: (0.0564, 0.0483, 0.0328), 4: (0.0312, 0.0226, 0.0100)}
    for bits, (greedy, refined, alternating) in table.items():
        assert error(quantize(weight, bits, 128, "greedy")) == pytest.approx(greedy, rel=0.03)
        # The stored codes are the nearest ones for the last scales, a step that the published method ends before.
        assert 0.75 * refined < error(quantize(weight, bits, 128, "refined")) < 1.02 * refined
        found = error(quantize(weight, bits, 128, rounds=15, offset=True))
        assert 4.0**-bits < found < 1.02 * alternating


def test_l6_one_greedy_plane_reaches_1_minus_2_over_pi() -> None:
    weight = _normal(64, 8192)
    packed = quantize(weight, 1, 8192, "greedy", scale_dtype=torch.float32)
    error = float((packed.dequantize() - weight).square().sum() / weight.square().sum())
    assert error == pytest.approx(1 - 2 / math.pi, abs=2e-3)


@pytest.mark.parametrize("method", ["alternating", "greedy", "refined", "searched"])
def test_importance_lowers_the_error_that_it_weighs(method: str) -> None:
    weight = _normal(32, 128)
    importance = torch.exp(2 * _normal(1, 128, 9)[0])
    (factor,) = split_importance(importance, weight, 128)
    assert factor is not None
    options = GridOptions(3, offset=True)
    plain, weighted = METHODS[method].choose(weight, options, None), METHODS[method].choose(weight, options, factor)
    assert float(weighted.error(weight, factor).sum()) < float(plain.error(weight, factor).sum())
    assert float(weighted.error(weight).sum()) >= float(plain.error(weight).sum()) * 0.98


def test_equal_importance_is_no_importance() -> None:
    weight = _normal(16, 96)
    for bits in (2, 3):
        plain = quantize(weight, bits, 32, offset=True)
        equal = quantize(weight, bits, 32, offset=True, importance=torch.full((96,), 7.0))
        torch.testing.assert_close(plain.dequantize(), equal.dequantize(), rtol=1e-4, atol=1e-5)
        grid, same = search_uniform(weight, bits, 32), search_uniform(weight, bits, 32, importance=torch.ones(96))
        torch.testing.assert_close(grid.dequantize(), same.dequantize(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_searched_grid_is_never_worse_than_the_whole_range(bits: int) -> None:
    weight = _normal(32, 256) * torch.exp(_normal(32, 256, 1))
    groups = weight.view(-1, 64)

    def errors(packed: PackedWeight) -> torch.Tensor:
        return (packed.dequantize().view(-1, 64) - groups).double().square().sum(1)

    searched, rounded = errors(search_uniform(weight, bits, 64)), errors(quantize_uniform(weight, bits, 64))
    assert (searched <= rounded * (1 + 1e-5)).all()
    assert float(searched.sum()) < 0.9 * float(rounded.sum()) or bits == 8


def test_a_damaged_importance_is_refused() -> None:
    weight = _normal(4, 16)
    for importance, message in (
        (torch.ones(8), "one per column"),
        (-torch.ones(16), "negative"),
        (torch.full((16,), float("nan")), "not finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize(weight, 2, 8, importance=importance)
    unseen = quantize(weight, 2, 8, importance=torch.zeros(16))
    assert torch.equal(unseen.planes, quantize(weight, 2, 8, importance=torch.ones(16)).planes)


def test_a_method_is_found_by_name_or_told_how_it_is_called_here() -> None:
    for name in METHODS:
        assert find_method(name) is METHODS[name]
    for name in ELSEWHERE:
        with pytest.raises(ConfigError, match=f"method = '{name}': say method:"):
            find_method(name)
    with pytest.raises(ConfigError, match="did you mean 'refined'"):
        find_method("refine")
