"""Nested planes: one artifact, several widths, each with its own scales on a prefix of the same planes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hcx.cli.main import main
from hcx.compress import CompressPlan, ModulePlan, compress_model, quantize, quantize_nested
from hcx.compress.feedback import output_error, quantize_to_outputs
from hcx.compress.methods import METHODS, GridOptions
from hcx.compress.nested import quantize_nested_to_outputs
from hcx.errors import CheckpointError, ConfigError, KernelError
from hcx.kernels import PackedWeight
from hcx.model.load import iter_tensors, load_model
from hcx.testing.tiny import tiny_model_directory


def _weight(rows: int = 48, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("offset", [False, True])
def test_every_width_is_a_prefix_with_falling_scales_and_near_the_width_alone(offset: bool) -> None:
    weight = _weight()
    packed = quantize_nested(weight, (2, 3, 4), METHODS["alternating"], GridOptions(4, offset=offset), 64)
    assert packed.widths == (2, 3, 4)
    errors = []
    for width in packed.widths:
        one = packed.at(width)
        assert torch.equal(one.planes, packed.planes[:width])
        assert bool((one.scales.float().diff(dim=0) <= 0).all())
        assert bool((one.scales >= 0).all())
        errors.append(float((one.dequantize() - weight).square().sum() / weight.square().sum()))
    alone = [
        float((quantize(weight, q, 64, offset=offset).dequantize() - weight).square().sum() / weight.square().sum())
        for q in (2, 3, 4)
    ]
    assert errors[0] == pytest.approx(alone[0])
    # Planes that a narrower width fixed are not those a wider one would choose: 4 bits pay most for it.
    assert alone[1] <= errors[1] < 1.6 * alone[1]
    assert alone[2] <= errors[2] < 2.5 * alone[2]
    assert errors[2] < 0.5 * errors[1] < 0.25 * errors[0]


def test_with_a_gram_matrix_every_width_is_fitted_to_outputs() -> None:
    weight = _weight(24, 128)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(512, 128, generator=generator) @ (
        torch.eye(128) + 0.2 * torch.randn(128, 128, generator=generator)
    )
    gram = inputs.t() @ inputs / 512
    options = GridOptions(4)
    fitted = quantize_nested_to_outputs(weight, gram, (2, 3, 4), METHODS["alternating"], options, 64)
    plain = quantize_nested(weight, (2, 3, 4), METHODS["alternating"], options, 64)
    for width in (2, 3, 4):
        assert output_error(weight, fitted.at(width), gram) < 0.9 * output_error(weight, plain.at(width), gram)
    alone = quantize_to_outputs(weight, gram, METHODS["alternating"], replace(options, bits=2), 64)
    torch.testing.assert_close(fitted.at(2).dequantize(), alone.dequantize())


def test_the_size_counts_the_scales_of_every_width() -> None:
    packed = quantize_nested(_weight(), (2, 4), METHODS["alternating"], GridOptions(4), 64)
    assert packed.bits_per_weight == pytest.approx(4 + (4 + 2) * 16 / 64)


def test_storing_and_reading_back_keeps_every_width() -> None:
    packed = quantize_nested(_weight(8, 40), (1, 2, 3), METHODS["refined"], GridOptions(3, offset=True), 16)
    tensors, entry = packed.to_tensors("m"), packed.describe()
    assert set(tensors) == set(PackedWeight.tensor_names("m", entry))
    back = PackedWeight.from_tensors("m", tensors, entry)
    for width in (1, 2, 3):
        assert torch.equal(back.at(width).dequantize(), packed.at(width).dequantize())
    with pytest.raises(KernelError, match="this weight has 1, 2, 3"):
        back.at(4)
    del tensors["m.scales_2"]
    with pytest.raises(KernelError, match=r"m\.scales_2: missing"):
        PackedWeight.from_tensors("m", tensors, entry)
    with pytest.raises(KernelError, match="unsorted"):
        replace(packed, sorted=False)


@pytest.mark.parametrize(
    ("widths", "method", "message"),
    [((2,), "alternating", "two or more"), ((3, 2), "alternating", "rising"), ((2, 3), "uniform", "evenly spaced")],
)
def test_widths_that_cannot_be_nested_are_refused(widths: tuple[int, ...], method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_nested(_weight(4, 16), widths, METHODS[method], GridOptions(widths[-1]), 16)
    with pytest.raises(ValueError, match=message):
        ModulePlan(bits=widths[-1], method=method, widths=widths)


def test_a_model_is_loaded_at_the_width_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_model_directory(tmp_path / "full")
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(source), "--widths", "2,3,4", "--group-size", "32", "--out", str(tmp_path / "nested")])
    assert ended.value.code == 0
    alone = tmp_path / "two"
    compress_model(source, alone, CompressPlan(default=ModulePlan(bits=2, group_size=32)))
    stem = "model.layers.1.mlp.down_proj.weight"
    expected = dict(iter_tensors(alone))[stem]
    from hcx.model.load import ModelFiles

    with ModelFiles(tmp_path / "nested", bits=2) as files:
        assert torch.equal(files.weight(stem), expected)
    logits = {}
    for bits in (2, 3, 4, None):
        decoder = load_model(tmp_path / "nested", bits=bits).decoder
        from hcx.model.meta import ForwardMeta

        logits[bits] = decoder.output(decoder(torch.arange(12)[None], ForwardMeta())).logits()
    assert torch.equal(logits[4], logits[None])
    assert not torch.equal(logits[3], logits[4])
    with pytest.raises(CheckpointError, match="served at 2, 3, 4"):
        load_model(tmp_path / "nested", bits=5)
    with pytest.raises(CheckpointError, match="not binary-coded"):
        load_model(source, bits=2)
    capsys.readouterr()
    answers = []
    for bits in ("2", "4"):
        with pytest.raises(SystemExit) as ended:
            main(["generate", str(tmp_path / "nested"), "--prompt", "The", "--max-tokens", "12", "--bits", bits])
        assert ended.value.code == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
