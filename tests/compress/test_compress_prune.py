"""Pruning: what stays, what it costs on real inputs, codes for kept weights alone, and the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hcx.compress import CompressPlan, ModulePlan, compress_model, quantize
from hcx.compress.prune import importance, keep_mask, prune_with_gram, quantize_kept
from hcx.compress.prune_plan import Pruning
from hcx.config import load_config
from hcx.errors import ConfigError
from hcx.model.load import ModelFiles, iter_tensors, load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.tiny import tiny_model_directory


def correlated(columns: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """Inputs whose scales differ and that depend on each other, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    return torch.randn(tokens, columns, generator=generator) @ mix * torch.rand(columns, generator=generator).exp()


@pytest.mark.parametrize("scope", ["matrix", "row", "group"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_exactly_the_least_important_of_each_scope_go(scope: str, sparsity: float) -> None:
    scores = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # with ties
    kept = keep_mask(scores, sparsity, scope, 20)  # type: ignore[arg-type]
    parts = {"matrix": (1, 240), "row": (6, 40), "group": (12, 20)}[scope]
    for own, mask in zip(scores.reshape(parts), kept.reshape(parts), strict=True):
        assert int((~mask).sum()) == round(sparsity * parts[1])
        if sparsity:
            assert float(own[~mask].max()) <= float(own[mask].min())


def test_importance_counts_what_a_weight_multiplies() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0]])
    assert importance(weight).tolist() == [[1, 2, 3]]
    assert importance(weight, torch.tensor([100.0, 4.0, 0.0])).tolist() == [[10, 4, 0]]
    with pytest.raises(ConfigError, match="one finite, non-negative number per input"):
        importance(weight, torch.tensor([1.0, -1.0, 0.0]))


def test_one_weight_goes_as_the_closed_form_of_the_optimal_brain_surgeon_says() -> None:
    x, weight = (
        correlated(6).double(),
        torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    )
    gram = x.T @ x / len(x)
    pruned, kept = prune_with_gram(weight, gram, 1 / 6)
    index = int((~kept[0]).nonzero())
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(6)
    # Columns are visited in order, so those before the pruned one are settled: the others solve least squares.
    rest = slice(index + 1, 6)
    expected = weight[0].clone()
    expected[rest] += weight[0, index] * torch.linalg.solve(damped[rest, rest], damped[rest, index])
    expected[index] = 0
    torch.testing.assert_close(pruned[0], expected, rtol=1e-9, atol=1e-12)


def test_weights_that_stay_make_up_for_those_that_go() -> None:
    x, weight = correlated(192), torch.randn(24, 192, generator=torch.Generator().manual_seed(3))
    gram = x.T @ x / len(x)

    def lost(candidate: Tensor) -> float:
        return float(((candidate - weight) @ x.T).square().sum() / (weight @ x.T).square().sum())

    by_magnitude = lost(weight * keep_mask(importance(weight), 0.6, "row"))
    by_activation = lost(weight * keep_mask(importance(weight, gram.diagonal()), 0.6, "row"))
    for scope in ("row", "matrix"):
        pruned, kept = prune_with_gram(weight, gram, 0.6, scope)  # type: ignore[arg-type]
        assert float((~kept).float().mean()) == pytest.approx(0.6, abs=0.01)
        assert bool((pruned[~kept] == 0).all())
        assert lost(pruned) < 0.8 * by_activation
    assert by_activation < by_magnitude


def test_codes_are_fitted_to_kept_weights_alone() -> None:
    weight = torch.randn(16, 130, generator=torch.Generator().manual_seed(4))
    kept = keep_mask(importance(weight), 0.7)
    masked = quantize_kept(weight, kept, 3, 64)

    def error(dense: Tensor) -> float:
        return float(((dense - weight) * kept).square().sum())

    assert torch.equal(masked.kept(), kept)
    assert bool((masked.dequantize()[~kept] == 0).all())
    assert error(masked.dequantize()) < 0.5 * error(quantize(weight, 3, 64).dequantize() * kept)
    errors = [error(quantize_kept(weight, kept, bits, 64).dequantize()) for bits in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    one = quantize_kept(weight, kept, 1, 130, rounds=0, scale_dtype=torch.float32)
    expected = (weight.abs() * kept).sum(1) / kept.sum(1)  # one plane: the mean magnitude of what is kept
    torch.testing.assert_close(one.packed.scales[0, :, 0], expected)


def test_nothing_kept_and_everything_kept_are_coded_too() -> None:
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(5))
    nothing = quantize_kept(weight, torch.zeros_like(weight, dtype=torch.bool), 2, 16)
    assert bool((nothing.dequantize() == 0).all())
    whole = quantize_kept(weight, torch.ones_like(weight, dtype=torch.bool), 2, 16)
    assert float((whole.dequantize() - weight).norm() / weight.norm()) < 0.4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("models") / "full", with_tokenizer=False)


def _logits(directory: Path) -> Tensor:
    decoder = load_model(directory).decoder
    with torch.no_grad():
        return decoder.output(decoder(torch.arange(24).view(2, 12), ForwardMeta())).logits()


def test_a_plan_prunes_and_encodes_and_the_model_computes_the_same(model: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        "default: {bits: 3, group_size: 32, prune: {sparsity: 0.7, storage: fixed_to_fixed}}\n"
        "rules:\n  - {pattern: '*.v_proj', keep: true}\n",
        encoding="utf-8",
    )
    encoded = load_config(CompressPlan, tmp_path / "plan.yaml")
    raw = CompressPlan(
        default=ModulePlan(bits=3, group_size=32, prune=Pruning(sparsity=0.7, storage="raw")), rules=encoded.rules
    )
    small, large = (compress_model(model, tmp_path / name, plan) for name, plan in (("f2f", encoded), ("raw", raw)))
    assert small.file_bytes < large.file_bytes
    assert torch.equal(_logits(tmp_path / "f2f"), _logits(tmp_path / "raw"))
    for name, weight in iter_tensors(tmp_path / "f2f"):
        if name.endswith("_proj.weight") and "v_proj" not in name:
            assert float((weight == 0).float().mean()) == pytest.approx(0.7, abs=0.001)
    with ModelFiles(tmp_path / "f2f") as files:
        entry = files.modules["model.layers.0.mlp.up_proj"]
        assert entry["bits"] == 3
        assert entry["encoding"]["kind"] == "fixed_to_fixed"


def test_code_words_that_save_nothing_are_refused_with_the_numbers(model: Path, tmp_path: Path) -> None:
    prune = Pruning(sparsity=0.3, storage="fixed_to_fixed")
    with pytest.raises(
        ConfigError, match=r"saves nothing here: 70\.\d% of the weights kept.*with the mask, where 2 planes"
    ):
        compress_model(model, tmp_path / "out", CompressPlan(default=ModulePlan(bits=2, prune=prune)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune": {"sparsity": 1.0}}, "above 0 and below 1"),
        ({"prune": {"sparsity": 0.5}, "method": "uniform"}, "pruned weights are coded with method: alternating"),
        ({"prune": {"sparsity": 0.5, "n_in": 13}}, "allowed: 1 to 12"),
        ({"prune": {"sparsity": 0.5}, "clusters": {"shards": "x"}}, "do not go together"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModulePlan.model_validate(settings)


def test_bad_arguments_name_what_is_allowed() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="70 %"):
        keep_mask(weight.abs(), 1.0)
    with pytest.raises(ConfigError, match="not finite"):
        keep_mask(torch.full((2, 2), torch.nan), 0.5)
    with pytest.raises(ConfigError, match="not positive definite"):
        prune_with_gram(weight, -torch.eye(8), 0.5)
    with pytest.raises(ConfigError, match="expected a finite square"):
        prune_with_gram(weight, torch.eye(7), 0.5)
    with pytest.raises(ConfigError, match="1 to 7 are allowed"):
        quantize_kept(weight, weight > 0, 8, 8)
    with pytest.raises(ConfigError, match="needs calibration text"):
        Pruning(sparsity=0.5, criterion="obs").compress(weight, 2, 8, 1, torch.float16)
