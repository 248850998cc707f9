"""Training scales over frozen planes is the same on every engine, and moves nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hcx.compress import CompressPlan, compress_model
from hcx.compress.alphatuning import AlphaTuning, AlphaTuningConfig
from hcx.dist import rehearsal
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.model.load import ModelFiles
from hcx.model.weights import TensorWeights
from hcx.optim import OptimConfig
from hcx.testing import seam
from hcx.testing.tiny import tiny_model_directory
from hcx.testing.workers import WorkerPool

TOLERANCE = 1e-5
OPTIM = OptimConfig(kind="adamw", lr=1e-2, eps=1e-3)
LAYOUTS = {
    "ddp2": TorchEngineConfig(),
    "tp2": MegatronEngineConfig(tensor_parallel=2),
    "pp2": MegatronEngineConfig(pipeline_parallel=2),
    **{f"zero{stage}": DeepSpeedEngineConfig(zero_stage=stage) for stage in range(4)},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Whole rows, which tensor-parallel ranks share, and groups that divide a rank's inputs; one matrix is kept."""
    path = tmp_path_factory.mktemp("coded")
    tiny_model_directory(path / "full", with_tokenizer=False)
    found = {}
    for group in (128, 16):
        plan = {
            "default": {"bits": 2, "group_size": group, "scale_dtype": "fp32"},
            "rules": [{"pattern": "*.0.self_attn.k_proj", "keep": True}],
        }
        found[group] = str(path / f"g{group}")
        compress_model(path / "full", Path(found[group]), CompressPlan.model_validate(plan, strict=False))
    return found


def run(engine_config: object, base: str, train: str) -> tuple[list[float], dict[str, torch.Tensor], dict]:
    """Losses of four steps, the weights after them, and the weights before."""
    if isinstance(engine_config, MegatronEngineConfig):
        rehearsal.enable()
    with ModelFiles(base) as files:
        config = AlphaTuningConfig(train=train)  # type: ignore[arg-type]
        transforms = [AlphaTuning(config, base), seam.masks(files.config)]
        weights = TensorWeights(files.weight, base)
        engine = build_engine(engine_config, files.config, OPTIM, transforms, weights, 0)  # type: ignore[arg-type]
        before = {name: tensor.clone() for name, tensor in engine.export_state()}
        place = engine.topology
        share = seam.GLOBAL_BATCH // place.dp_size
        losses = []
        for step in range(4):
            rows = seam.global_batch(files.config, step)[place.dp_rank * share : (place.dp_rank + 1) * share]
            losses.append(engine.train_step(StepBatch(step, rows), seam.WeightedNextToken(), 1.0).loss)
        after = {name: tensor.clone() for name, tensor in engine.export_state()}
        engine.close()
    return losses, after, before


@pytest.mark.parametrize("group", [128, 16])
@pytest.mark.parametrize("train", ["first", "all"])
def test_only_the_chosen_scales_move(bases: dict[int, str], group: int, train: str) -> None:
    losses, after, before = run(TorchEngineConfig(), bases[group], train)
    assert len(set(losses)) == 4
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    planes = ["scales.0"] if train == "first" else ["scales.0", "scales.1"]
    with ModelFiles(bases[group]) as files:
        coded = list(files.modules)
        assert len(coded) == 13
        assert moved == {f"{stem}.{name}" for stem in coded for name in planes}
        count = sum(files.packed(stem).scales[0].numel() for stem in coded) * len(planes)
    assert sum(after[name].numel() for name in moved) == count
    # The planes are no parameters at all, and the dense forms of coded weights are gone.
    assert not any(f"{stem}.weight" in after for stem in coded)


@pytest.mark.parametrize("group", [128, 16])
@pytest.mark.parametrize(
    "layout",
    [
        "tp2",
        "zero3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp2", "pp2", "zero0", "zero1", "zero2")),
    ],
)
def test_any_layout_equals_one_process(pool: WorkerPool, bases: dict[int, str], layout: str, group: int) -> None:
    expected_losses, expected, _ = run(TorchEngineConfig(), bases[group], "first")
    for losses, after, _ in pool.run(run, 2, LAYOUTS[layout], bases[group], "first"):
        assert losses == pytest.approx(expected_losses, rel=TOLERANCE)
        assert after.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(after[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)


def test_activation_checkpointing_changes_nothing(bases: dict[int, str]) -> None:
    expected_losses, expected, _ = run(TorchEngineConfig(), bases[16], "first")
    losses, after, _ = run(TorchEngineConfig(activation_checkpointing=True), bases[16], "first")
    assert losses == pytest.approx(expected_losses, rel=TOLERANCE)
    assert all(torch.allclose(after[name], tensor, rtol=TOLERANCE, atol=TOLERANCE) for name, tensor in expected.items())
