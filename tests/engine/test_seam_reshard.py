"""A run that changes its engine and its number of processes has the losses and the samples of one that never did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.engine.footprint import AnyEngineConfig
from hcx.optim import OptimConfig
from hcx.recipe.run import run_training
from hcx.recipe.train import DataSection, TrainRecipe, ValidationSection
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool
from hcx.train import TrainResult, latest_checkpoint, read_ledger
from hcx.train.trainer import TrainerConfig

TOLERANCE = 1e-5
STEPS, LEG = 16, 3
"""The last leg of every run has at least ten steps."""
TWO_RANKS: dict[str, AnyEngineConfig] = {
    "ddp2": TorchEngineConfig(),
    "zero0": DeepSpeedEngineConfig(zero_stage=0),
    "zero1": DeepSpeedEngineConfig(zero_stage=1),
    "zero2": DeepSpeedEngineConfig(zero_stage=2),
    "zero3": DeepSpeedEngineConfig(zero_stage=3),
    "dp2": MegatronEngineConfig(),
    "dp2-distopt": MegatronEngineConfig(distributed_optimizer=True),
    "tp2": MegatronEngineConfig(tensor_parallel=2),
    "tp2-sp": MegatronEngineConfig(tensor_parallel=2, sequence_parallel=True),
    "pp2": MegatronEngineConfig(pipeline_parallel=2),
    "pp2-vp2": MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2),
}
REPLICAS = ("ddp2", "zero0", "zero1", "zero2", "zero3", "dp2", "dp2-distopt")
"""Layouts that run on any number of processes."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainRecipe:
    """All steps in one process."""
    directory = tmp_path_factory.mktemp("reshard")
    tiny_shards(directory / "text")
    recipe = TrainRecipe(
        name="reshard",
        out=str(directory / "one"),
        # A block for every chunk of the interleaved pipeline.
        model=tiny_config(vocab_size=512, num_layers=4, tie_embeddings=True, initializer_range=0.02),
        data=DataSection(shards=str(directory / "text" / "shards"), seq_len=32),
        train=TrainerConfig(steps=STEPS, global_batch=4, micro_batch=1, validate_every=0),
        # A large eps: with 1e-8, gradients at rounding level become updates of full size.
        optim=OptimConfig(kind="adamw", lr=3e-3, eps=1e-3),
        validation=ValidationSection(micro_batch=2, max_documents=2),
    )
    assert run_training(recipe).finished
    return recipe


def after(steps: int) -> Callable[[], str | None]:
    """A reason to stop once so many steps are done."""
    asked = iter(range(steps + 1))
    return lambda: "the end of this leg" if next(asked, steps) >= steps else None


def leg(recipe: TrainRecipe, steps: int, resume: str = "auto") -> TrainResult:
    """Some steps of the run, from its newest checkpoint, to a new one."""
    return run_training(recipe, resume, after(steps))


def go(pool: WorkerPool, recipe: TrainRecipe, processes: int, steps: int, resume: str = "auto") -> None:
    if processes == 1:
        result = leg(recipe, steps, resume)
    else:
        result = pool.run(leg, processes, recipe, steps, resume)[0]
    assert result.finished == (result.step == STEPS)


def elsewhere(recipe: TrainRecipe, name: str, engine: AnyEngineConfig) -> TrainRecipe:
    return recipe.model_copy(update={"engine": engine, "out": str(Path(recipe.out).parent / name)})


def newest(recipe: TrainRecipe) -> Path:
    found = latest_checkpoint(Path(recipe.out) / "checkpoints")
    assert found is not None
    return found


def assert_same_course(recipe: TrainRecipe, undisturbed: TrainRecipe) -> None:
    """Losses of every step, which samples each had, and the model at the end."""
    rows, wanted = read_ledger(newest(recipe)), read_ledger(newest(undisturbed))
    assert [(row["step"], row["samples"]) for row in rows] == [(row["step"], row["samples"]) for row in wanted]
    samples = [number for row in rows for first, stop in row["samples"] for number in range(first, stop)]
    assert sorted(samples) == list(range(4 * STEPS))
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([row["loss"] for row in wanted], rel=TOLERANCE, abs=TOLERANCE)
    for name, tensor in load_file(next(Path(undisturbed.out, "model").glob("*.safetensors"))).items():
        found = load_file(next(Path(recipe.out, "model").glob("*.safetensors")))[name]
        torch.testing.assert_close(found, tensor, rtol=TOLERANCE, atol=TOLERANCE)


def chain(pool: WorkerPool, undisturbed: TrainRecipe, name: str, legs: list[tuple[int, AnyEngineConfig]]) -> None:
    """Short legs, then one to the end."""
    for number, (processes, engine) in enumerate(legs):
        recipe = elsewhere(undisturbed, name, engine)
        go(pool, recipe, processes, LEG if number < len(legs) - 1 else STEPS)
    assert_same_course(recipe, undisturbed)


@pytest.mark.parametrize(
    ("first", "alone", "last"),
    [
        ("zero3", TorchEngineConfig(), "pp2"),
        # Started by no launcher: the library's own variables are not there.
        ("dp2-distopt", DeepSpeedEngineConfig(zero_stage=2), "zero1"),
        ("tp2-sp", TorchEngineConfig(), "ddp2"),
        ("pp2-vp2", TorchEngineConfig(), "pp2-vp2"),
    ],
)
def test_a_run_goes_on_alone_and_then_on_another_engine(
    pool: WorkerPool,
    undisturbed: TrainRecipe,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    alone: AnyEngineConfig,
    last: str,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    chain(pool, undisturbed, f"{first}-{last}", [(2, TWO_RANKS[first]), (1, alone), (2, TWO_RANKS[last])])


@pytest.mark.slow
@pytest.mark.parametrize("layout", REPLICAS)
def test_replicas_go_from_two_to_one_to_four(pool: WorkerPool, undisturbed: TrainRecipe, layout: str) -> None:
    legs = [(processes, TWO_RANKS[layout]) for processes in (2, 1, 4)]
    chain(pool, undisturbed, f"{layout}-2-1-4", legs)


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, undisturbed: TrainRecipe) -> Callable[[str], Path]:
    """A checkpoint of each layout after a short leg."""

    def checkpoint(layout: str) -> Path:
        recipe = elsewhere(undisturbed, f"{layout}-saved", TWO_RANKS[layout])
        if latest_checkpoint(Path(recipe.out) / "checkpoints") is None:
            go(pool, recipe, 2, LEG)
        return newest(recipe)

    return checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("last", TWO_RANKS)
@pytest.mark.parametrize("first", TWO_RANKS)
def test_every_layout_goes_on_on_every_other(
    pool: WorkerPool, undisturbed: TrainRecipe, saved: Callable[[str], Path], first: str, last: str
) -> None:
    recipe = elsewhere(undisturbed, f"{first}-on-{last}", TWO_RANKS[last])
    go(pool, recipe, 2, STEPS, str(saved(first)))
    assert_same_course(recipe, undisturbed)
