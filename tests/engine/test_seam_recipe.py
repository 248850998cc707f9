"""A recipe gives one curve and one model on every engine, and a run begun on one goes on on another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.optim import OptimConfig
from hcx.recipe.run import run_training
from hcx.recipe.train import DataSection, TrainRecipe, ValidationSection
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool
from hcx.train import latest_checkpoint, read_ledger
from hcx.train.trainer import TrainerConfig

TOLERANCE = 1e-5
STEPS, HALF = 20, 10
ENGINES = {
    "pp2": MegatronEngineConfig(pipeline_parallel=2),
    "pp2-vp2": MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2),
    "tp2-sp": MegatronEngineConfig(tensor_parallel=2, sequence_parallel=True),
    "zero3": DeepSpeedEngineConfig(zero_stage=3, data_parallel=2),
    "zero2-offload": DeepSpeedEngineConfig(zero_stage=2, data_parallel=2, offload_optimizer="cpu"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe")
    tiny_shards(path / "text")
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def recipe(directory: Path, request: pytest.FixtureRequest) -> TrainRecipe:
    """Twenty steps in one process, each of four micro-batches; a checkpoint after ten."""
    recipe = TrainRecipe(
        name="seam",
        out=str(directory / f"one-{request.param}"),
        model=tiny_config(vocab_size=512, num_layers=4, tie_embeddings=request.param, initializer_range=0.02),
        data=DataSection(shards=str(directory / "text" / "shards"), seq_len=32),
        train=TrainerConfig(steps=STEPS, global_batch=4, micro_batch=1, validate_every=HALF, checkpoint_every=HALF),
        optim=OptimConfig(kind="adamw", lr=3e-3, eps=1e-3),
        engine=TorchEngineConfig(),
        validation=ValidationSection(micro_batch=2, max_documents=4),
    )
    assert run_training(recipe).finished
    return recipe


def metrics(out: str) -> list[dict[str, float]]:
    """What does not depend on time, by step; events (starts, endings) are not part of what was computed."""
    lines = Path(out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "event" not in row]
    keep = ("step", "train/loss", "train/lr", "train/grad_norm", "train/tokens", "validation/", "data/share")
    return [{key: value for key, value in row.items() if key.startswith(keep)} for row in rows]


def samples(out: str) -> list[tuple[int, object]]:
    """Which samples each step had."""
    newest = latest_checkpoint(Path(out) / "checkpoints")
    assert newest is not None
    return [(row["step"], row["samples"]) for row in read_ledger(newest)]


def weights(out: str) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(Path(out, "model").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_run(out: str, expected: TrainRecipe, from_step: int) -> None:
    rows, others = metrics(out), [row for row in metrics(expected.out) if row["step"] > from_step or from_step == 0]
    assert len(rows) == len(others) >= STEPS - from_step
    assert samples(out) == samples(expected.out)
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE)
    found, wanted = weights(out), weights(expected.out)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("layout", ENGINES)
def test_a_recipe_gives_one_curve_and_one_model_on_every_engine(
    pool: WorkerPool, recipe: TrainRecipe, layout: str
) -> None:
    other = recipe.model_copy(update={"engine": ENGINES[layout], "out": f"{recipe.out}-{layout}"})
    assert all(result.finished for result in pool.run(run_training, 2, other))
    assert_same_run(other.out, recipe, from_step=0)


@pytest.mark.parametrize("layout", ENGINES)
def test_a_run_begun_in_one_process_goes_on_on_another_engine(
    pool: WorkerPool, recipe: TrainRecipe, layout: str
) -> None:
    other = recipe.model_copy(update={"engine": ENGINES[layout], "out": f"{recipe.out}-{layout}-resumed"})
    checkpoint = str(Path(recipe.out) / "checkpoints" / f"step-{HALF:06d}")
    assert all(result.finished for result in pool.run(run_training, 2, other, checkpoint))
    assert_same_run(other.out, recipe, from_step=HALF)
