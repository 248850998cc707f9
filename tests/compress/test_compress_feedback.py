"""Quantization to a layer's outputs: error feedback beside a plain loop and another library, then the descent."""

from __future__ import annotations

import itertools

import pytest
import torch

from hcx.compress import quantize, quantize_to_outputs, quantize_uniform
from hcx.compress.feedback import DAMPING, damped_gram, descend, feedback_state, output_error
from hcx.compress.methods import METHODS, GridOptions
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight


def _layer(rows: int = 24, columns: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram matrix of correlated inputs of very different size, as transformers have."""
    generator = torch.Generator().manual_seed(seed)
    mixing = 0.1 * torch.randn(columns, columns, generator=generator)
    mixing += torch.diag(torch.exp(0.8 * torch.randn(columns, generator=generator)))
    inputs = torch.randn(6 * columns, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs / len(inputs)


def _optq(weight: torch.Tensor, gram: torch.Tensor, packed: PackedWeight, bits: int, group: int) -> torch.Tensor:
    """The paper's algorithm in fp64 and without its shortcuts: the inverse is downdated column by column (OBQ's
    elimination), with the step sizes that `packed` stores."""
    rest, inverse = weight.double().clone(), torch.linalg.inv(damped_gram(gram, gram.shape[0]).double())
    result = torch.zeros_like(rest)
    for column in range(weight.shape[1]):
        step = 2 * packed.scales[-1, :, column // group].double()
        assert packed.offset is not None
        lowest = packed.offset[:, column // group].double() - step * (2**bits - 1) / 2
        result[:, column] = ((rest[:, column] - lowest) / step).round().clamp(0, 2**bits - 1) * step + lowest
        error = (rest[:, column] - result[:, column]) / inverse[column, column]
        rest[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 96), (4, 40)])
def test_feedback_without_descent_is_the_published_algorithm(bits: int, group: int) -> None:
    weight, gram = _layer()
    options = GridOptions(bits, scale_dtype=torch.float32)
    packed = quantize_to_outputs(weight, gram, METHODS["uniform"], options, group, descent=0)
    expected = _optq(weight, gram, packed, bits, group)
    # Codes at the edge between two levels may fall either way in fp32; then later ones differ, too.
    same = (packed.dequantize().double() - expected).abs().amax(1) < 1e-4
    assert float(same.double().mean()) > 0.9


def test_feedback_beats_rounding_and_descent_beats_feedback() -> None:
    weight, gram = _layer(48, 128)
    for bits in (2, 3, 4):
        options = GridOptions(bits)
        rounded = output_error(weight, quantize_uniform(weight, bits, 64), gram)
        fed = output_error(weight, quantize_to_outputs(weight, gram, METHODS["searched"], options, 64, 0), gram)
        found = output_error(weight, quantize_to_outputs(weight, gram, METHODS["searched"], options, 64, 4), gram)
        assert found < 0.95 * fed < 0.8 * rounded
        coded = output_error(weight, quantize(weight, bits, 64), gram)
        binary = output_error(weight, quantize_to_outputs(weight, gram, METHODS["alternating"], options, 64, 4), gram)
        assert binary < 0.7 * coded


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("offset", [False, True])
def test_no_round_of_descent_raises_the_error_of_any_row(method: str, offset: bool) -> None:
    weight, gram = _layer(16, 72)
    options, entry = GridOptions(3, offset=offset), METHODS[method]
    state = feedback_state(weight, gram, entry, options, 24, act_order=True)
    before = state.error()
    for _ in range(4):
        descend(state, offset or entry.uniform, entry.uniform, options.scale_dtype)
        after = state.error()
        assert (after <= before * (1 + 1e-5)).all()
        before = after


def test_descent_ends_where_no_single_code_and_no_scale_is_better() -> None:
    """Every other code of every weight is tried by brute force."""
    weight, gram = _layer(6, 24)
    options = GridOptions(2, scale_dtype=torch.float32)
    state = feedback_state(weight, gram, METHODS["alternating"], options, 12)
    for _ in range(100):
        if not descend(state, False, False, torch.float32):
            break
    packed_error = state.error()
    wide = state.gram.double()
    values = torch.cat([state.values(group) for group in range(2)], dim=1).double()
    from hcx.compress.codes import levels

    for column in range(24):
        table = levels(state.scales[:, column // 12], state.offsets[:, column // 12]).double()
        for level in range(4):
            changed = values.clone()
            changed[:, column] = table[:, level]
            rest = changed - weight.double()
            assert (((rest @ wide) * rest).sum(1) >= packed_error * (1 - 1e-5)).all()
    for row in range(6):
        basis = torch.zeros(24, 4, dtype=torch.float64)
        for column, plane in itertools.product(range(24), range(2)):
            sign = 2.0 * ((int(state.patterns[row, column]) >> plane) & 1) - 1
            basis[column, 2 * (column // 12) + plane] = sign
        best = torch.linalg.solve(basis.t() @ wide @ basis, basis.t() @ wide @ weight[row].double())
        rest = basis @ best - weight[row].double()
        # Groups are solved in turns: near, not at, the joint optimum over all groups.
        assert float(packed_error[row]) <= 1.05 * float((rest @ wide) @ rest)


def test_uncorrelated_equal_inputs_give_what_plain_quantization_gives() -> None:
    """With the identity as Gram matrix no error can be made up for: feedback and descent change nothing."""
    weight, _ = _layer(16, 64)
    options = GridOptions(3, rounds=200, scale_dtype=torch.float32)
    fed = quantize_to_outputs(weight, torch.eye(64), METHODS["alternating"], options, 32, 0)
    plain = quantize(weight, 3, 32, rounds=200, scale_dtype=torch.float32)
    torch.testing.assert_close(fed.dequantize(), plain.dequantize(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(("columns", "group"), [(50, 16), (33, 64), (8, 8)])
def test_any_shape_gives_a_sorted_weight_that_reads_back_as_the_state(method: str, columns: int, group: int) -> None:
    weight, gram = _layer(5, columns)
    entry, options = METHODS[method], GridOptions(3, offset=True)
    state = feedback_state(weight, gram, entry, options, group)
    descend(state, True, entry.uniform, options.scale_dtype)
    from hcx.compress.codes import pack

    packed = pack(state.codes(), state.group_size, True, torch.float16)
    values = torch.cat([state.values(index) for index in range(state.scales.shape[1])], dim=1)
    torch.testing.assert_close(packed.dequantize(), values, rtol=1e-5, atol=1e-6)
    assert bool((packed.scales.float().diff(dim=0) <= 0).all())
    assert bool((packed.scales >= 0).all())


def test_a_channel_that_is_never_active_costs_nothing_and_breaks_nothing() -> None:
    weight, gram = _layer(8, 32)
    gram[5] = gram[:, 5] = 0.0
    packed = quantize_to_outputs(weight, gram, METHODS["alternating"], GridOptions(3), 32)
    assert torch.isfinite(packed.dequantize()).all()
    assert output_error(weight, packed, gram) < output_error(weight, quantize(weight, 3, 32), gram)
    dead = quantize_to_outputs(weight, torch.zeros(32, 32), METHODS["alternating"], GridOptions(3), 32)
    assert torch.isfinite(dead.dequantize()).all()


def test_a_damaged_gram_matrix_is_refused() -> None:
    weight, gram = _layer(8, 32)
    with pytest.raises(ConfigError, match=r"expected \(32, 32\)"):
        quantize_to_outputs(weight, gram[:16, :16], METHODS["uniform"], GridOptions(3), 32)
    gram[3, 3] = float("inf")
    with pytest.raises(ConfigError, match="not finite"):
        quantize_to_outputs(weight, gram, METHODS["uniform"], GridOptions(3), 32)


@pytest.mark.slow  # importing the peer takes longer than all else here
def test_feedback_equals_another_library_where_it_is_installed() -> None:
    """llmcompressor's GPTQ of one weight with our step sizes: the same integers, but for ties and rounding."""
    pytest.importorskip("llmcompressor", reason="the peer is not installed: pip install llmcompressor --no-deps")
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    weight, gram = _layer(24, 128)
    bits = 4
    packed = quantize_uniform(weight, bits, 128, torch.float32)
    assert packed.offset is not None
    scale = 2 * packed.scales[-1]
    # Its zero points are integers: move the weight so that ours are, too.
    zero = (-packed.offset / scale).round()
    whole = weight - (packed.offset + zero * scale)
    grid = GridOptions(bits, scale_dtype=torch.float32)
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=128, symmetric=False)
    theirs, _, _ = quantize_weight(
        whole[None].clone(), gram[None].clone(), scale[None], zero[None], None, args, percdamp=DAMPING
    )
    ours = quantize_to_outputs(whole, gram, METHODS["uniform"], grid, 128, descent=0)
    ratio = output_error(whole, ours, gram) / _dense_error(whole, theirs[0], gram)
    assert 0.9 < ratio < 1.1


def _dense_error(weight: torch.Tensor, found: torch.Tensor, gram: torch.Tensor) -> float:
    rest = (found - weight).double()
    whole = weight.double()
    return float(((rest @ gram.double()) * rest).sum() / ((whole @ gram.double()) * whole).sum())
