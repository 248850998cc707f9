"""Layers out of XOR networks train alike on every engine."""

from __future__ import annotations

import pytest
import torch

from hcx.compress.flexor import Flexor, FlexorConfig
from hcx.compress.flexor.config import FlexorException
from hcx.dist import rehearsal
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.optim import OptimConfig
from hcx.testing import seam
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool

TOLERANCE = 1e-5
MODEL = tiny_config()
OPTIM = OptimConfig(kind="adamw", lr=1e-2, eps=1e-3)
CONFIG = FlexorConfig(
    n_in=8,
    n_out=16,
    planes=2,
    group_size=16,
    clip_every=2,
    exceptions=(
        FlexorException(pattern="*.0.self_attn.k_proj", keep=True),
        FlexorException(pattern="*.o_proj", n_in=12),
    ),
)
LAYOUTS = {
    "tp2": MegatronEngineConfig(tensor_parallel=2),
    "pp2": MegatronEngineConfig(pipeline_parallel=2),
    "zero3": DeepSpeedEngineConfig(zero_stage=3),
    "ddp2": TorchEngineConfig(),
}
STEPS = 4


def run(engine_config: object, config: FlexorConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of four steps, and the parameters after them."""
    if isinstance(engine_config, MegatronEngineConfig):
        rehearsal.enable()
    flexor = Flexor(config, seed=3, warmup_steps=2)
    transforms = [flexor, seam.masks(MODEL)]
    engine = build_engine(engine_config, MODEL, OPTIM, transforms, seam.SeamWeights(MODEL, 3), 0)  # type: ignore[arg-type]
    place = engine.topology
    share = seam.GLOBAL_BATCH // place.dp_size
    losses = []
    for step in range(STEPS):
        flexor.before_step(step)
        rows = seam.global_batch(MODEL, step)[place.dp_rank * share : (place.dp_rank + 1) * share]
        losses.append(engine.train_step(StepBatch(step, rows), seam.WeightedNextToken(), 1.0).loss)
        flexor.after_step(step, engine)
    weights = {name: tensor.clone() for name, tensor in engine.export_state()}
    engine.close()
    return losses, weights


@pytest.mark.parametrize("group_size", [16, 1 << 20])
@pytest.mark.parametrize(
    "layout", ["tp2", "zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "ddp2"))]
)
def test_any_layout_equals_one_process(pool: WorkerPool, layout: str, group_size: int) -> None:
    config = CONFIG.model_copy(update={"group_size": group_size})
    expected_losses, expected = run(TorchEngineConfig(), config)
    for losses, weights in pool.run(run, 2, LAYOUTS[layout], config):
        assert losses == pytest.approx(expected_losses, rel=TOLERANCE)
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def test_keys_and_scales_replace_the_weights_and_are_trained() -> None:
    losses, weights = run(TorchEngineConfig(), CONFIG)
    assert losses[-1] != losses[0]
    stem = "model.layers.1.mlp.down_proj"
    assert f"{stem}.weight" not in weights
    assert weights[f"{stem}.keys.0"].shape == (64, 96 // 16 * 8)
    assert weights["model.layers.1.self_attn.o_proj.keys.1"].shape == (64, 64 // 16 * 12)
    assert weights[f"{stem}.scales.1"].shape == (64, 6)
    assert "model.layers.0.self_attn.k_proj.weight" in weights
    # Clipped after the last step: no key is outside of the window of its gradient, 2 / S with S = 10.
    assert max(float(w.abs().max()) for name, w in weights.items() if ".keys." in name) <= 0.2 + 1e-6


def test_activation_checkpointing_changes_nothing() -> None:
    expected_losses, expected = run(TorchEngineConfig(), CONFIG)
    losses, weights = run(TorchEngineConfig(activation_checkpointing=True), CONFIG)
    assert losses == pytest.approx(expected_losses, rel=TOLERANCE)
    assert all(
        torch.allclose(weights[name], tensor, rtol=TOLERANCE, atol=TOLERANCE) for name, tensor in expected.items()
    )
