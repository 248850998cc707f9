"""A run in stages: another length, another rotary base, the same tokens per step, resumable on either side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hcx.cli.main import main
from hcx.config import dump_yaml
from hcx.data import PackedLoader, ShardSet
from hcx.engine.base import StepBatch
from hcx.engine.config import MegatronEngineConfig, TorchEngineConfig
from hcx.engine.torch_engine import TorchEngine
from hcx.errors import CheckpointError, ConfigError
from hcx.model.weights import InitWeights
from hcx.obs import read_jsonl
from hcx.optim import OptimConfig, lr_factor
from hcx.recipe import DataSection, TrainRecipe, ValidationSection, check_recipe
from hcx.recipe.run import run_training
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool
from hcx.train import CheckpointReader, NextToken, StageConfig, TrainerConfig, plan_stages, read_ledger
from hcx.train.validation import negative_log_likelihood

SHORT, LONG = 128, 1024
STEPS, SWITCH = 10, 6
THETA = 50000.0
STAGES = (StageConfig(share=0.6, seq_len=SHORT), StageConfig(share=0.4, seq_len=LONG, rope_theta=THETA))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_shards(tmp_path_factory.mktemp("text")).directory)


def recipe(shards: str, out: Path, stages: tuple[StageConfig, ...] = STAGES, **train: Any) -> TrainRecipe:
    return TrainRecipe(
        name="stages",
        out=str(out),
        model=tiny_config(vocab_size=512, max_seq_len=LONG, tie_embeddings=True, initializer_range=0.02),
        data=DataSection(shards=shards, seq_len=SHORT),
        train=TrainerConfig(
            **{
                "steps": STEPS,
                "global_batch": 16,
                "micro_batch": 4,
                "stages": stages,
                "validate_every": 5,
                "checkpoint_every": 1,
                "keep_checkpoints": 0,
                **train,
            }
        ),
        optim=OptimConfig(lr=3e-3),
        validation=ValidationSection(max_documents=2),
    )


@pytest.fixture(scope="module")
def straight(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, with a checkpoint of every step."""
    out = tmp_path_factory.mktemp("straight")
    assert run_training(recipe(shards, out)).finished
    return out


def masters(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    reader = CheckpointReader(path)
    return {(name, key): reader.read(name, key) for name in reader.names() for key in reader.keys(name)}


@pytest.mark.parametrize("stopped_at", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_a_run_stopped_before_at_or_after_the_switch_ends_with_the_same_bits(
    shards: str, tmp_path: Path, straight: Path, stopped_at: int
) -> None:
    calls = iter(range(100))
    broken = recipe(shards, tmp_path / "run", checkpoint_every=0)
    first = run_training(broken, stop=lambda: "a test" if next(calls) == stopped_at else None)
    assert (first.finished, first.step) == (False, stopped_at)
    assert run_training(broken).finished
    last = f"checkpoints/step-{STEPS:06d}"
    one, two = masters(tmp_path / "run" / last), masters(straight / last)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in two)
    losses = [
        [(row["step"], row["train/loss"]) for row in read_jsonl(out / "metrics.jsonl") if "train/loss" in row]
        for out in (tmp_path / "run", straight)
    ]
    assert losses[0] == losses[1]
    assert read_ledger(tmp_path / "run" / last) == read_ledger(straight / last)
    switches = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "stage"]
    assert [(row["step"], row["seq_len"], row["global_batch"]) for row in switches] == [(SWITCH + 1, LONG, 2)]


def test_the_run_is_that_of_an_engine_stepped_by_hand_over_both_lengths(shards: str, straight: Path) -> None:
    """Optimizer state goes on, the batch is an eighth, the samples are those of the same step number."""
    made = recipe(shards, straight)
    engine = TorchEngine(
        engine_config=TorchEngineConfig(),
        model_config=made.model,
        optim_config=made.optim,
        weights=InitWeights(made.model, 0),
    )
    short, long = (PackedLoader(ShardSet.open(shards), "train", length, 0) for length in (SHORT, LONG))
    for step in range(STEPS):
        batches = short.step_batch(step, 16, 4) if step < SWITCH else long.step_batch(step, 2, 1)
        if step == SWITCH:
            engine.set_rope_theta(THETA)
        assert sum(batch.tokens.numel() for batch in batches) == 16 * SHORT
        engine.train_step(StepBatch(step, batches), NextToken(), lr_factor(made.optim.schedule, step, STEPS))
    reader = CheckpointReader(straight / "checkpoints" / f"step-{STEPS:06d}")
    for name, tensor in engine.export_state():
        assert torch.equal(reader.read(name, "master"), tensor), name
    assert reader.trainer_state["engine"]["optimizer_steps"] == STEPS


def test_the_new_base_is_that_of_a_model_built_with_it(shards: str) -> None:
    rows = PackedLoader(ShardSet.open(shards), "train", LONG, 0).step_batch(0, 2, 1)
    scores = []
    for built, later in ((10000.0, THETA), (THETA, None), (10000.0, None)):
        config = tiny_config(vocab_size=512, max_seq_len=LONG, rope_theta=built)
        engine = TorchEngine(
            engine_config=TorchEngineConfig(),
            model_config=config,
            optim_config=OptimConfig(),
            weights=InitWeights(config, 0),
        )
        if later is not None:
            engine.set_rope_theta(later)
        scores.append(torch.stack(engine.score(rows, negative_log_likelihood)))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_the_exported_model_and_a_converted_checkpoint_state_the_base_of_their_stage(
    straight: Path, tmp_path: Path
) -> None:
    def theta(config: Path) -> float:
        stated = json.loads(config.read_text())
        return float(stated["rope_theta"] if "rope_theta" in stated else stated["rope_parameters"]["rope_theta"])

    assert theta(straight / "model" / "config.json") == THETA
    for step, base in ((SWITCH, 10000.0), (SWITCH + 1, THETA)):
        with pytest.raises(SystemExit) as ended:
            main(
                ["convert", str(straight / "checkpoints" / f"step-{step:06d}"), str(tmp_path / f"{step}"), "--to", "hf"]
            )
        assert ended.value.code == 0
        assert theta(tmp_path / f"{step}" / "config.json") == base


def test_stages_that_have_begun_cannot_change_and_later_ones_can(shards: str, tmp_path: Path) -> None:
    calls = iter(range(100))
    begun = recipe(shards, tmp_path / "run", stages=(), checkpoint_every=0)
    run_training(begun, stop=lambda: "a test" if next(calls) == 4 else None)
    # A run without stages goes on as the first stage of one with them ...
    calls = iter(range(100))
    longer = recipe(shards, tmp_path / "run", checkpoint_every=0)
    assert run_training(longer, stop=lambda: "a test" if next(calls) == 4 else None).step == 8
    # ... and what is past is past.
    changed = (StageConfig(share=0.5, seq_len=SHORT), StageConfig(share=0.5, seq_len=LONG, rope_theta=THETA))
    with pytest.raises(CheckpointError, match=r"train\.stages\.0 was .*'stop_step': 6.*cannot change"):
        run_training(recipe(shards, tmp_path / "run", stages=changed))
    with pytest.raises(CheckpointError, match="ends at step 1, but the checkpoint was written without stages"):
        calls = iter(range(100))
        run_training(
            begun.model_copy(update={"out": str(tmp_path / "other")}), stop=lambda: "a" if next(calls) == 4 else None
        )
        early = (StageConfig(share=0.1, seq_len=SHORT), StageConfig(share=0.9, seq_len=LONG))
        run_training(recipe(shards, tmp_path / "other", stages=early))


def test_a_plan_is_made_of_shares_of_the_tokens() -> None:
    plan = plan_stages(
        (StageConfig(share=0.9, seq_len=4096), StageConfig(share=0.1, seq_len=32768, rope_theta=5e5)),
        steps=1000,
        global_batch=512,
        micro_batch=8,
        seq_len=4096,
        rope_theta=1e4,
    )
    assert [(stage.first_step, stage.stop_step) for stage in plan] == [(0, 900), (900, 1000)]
    assert [(stage.global_batch, stage.micro_batch, stage.rope_theta) for stage in plan] == [
        (512, 8, 1e4),
        (64, 1, 5e5),
    ]
    assert {stage.global_batch * stage.seq_len for stage in plan} == {512 * 4096}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(0.5, 128), (0.4, 256)], "sum to 0.9"),
        ([(0.99, 128), (0.01, 256)], r"train.stages.1.share = 0.01: not one of train.steps"),
        ([(0.5, 128), (0.5, 200)], r"train.stages.1.seq_len = 200: must divide the tokens of a step"),
        ([(0.5, 128), (0.5, 2048)], r"train.stages.1.seq_len = 2048: longer than model.max_seq_len = 1024"),
    ],
)
def test_stages_that_cannot_run_say_why(
    shards: str, tmp_path: Path, stages: list[tuple[float, int]], message: str
) -> None:
    chosen = tuple(StageConfig(share=share, seq_len=length) for share, length in stages)
    with pytest.raises(ConfigError, match=message):
        check_recipe(recipe(shards, tmp_path, stages=chosen))


def test_a_recipe_file_may_name_stages(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe(shards, tmp_path / "out")), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["train", str(file), "--dry-run"])
    assert ended.value.code == 0
    assert "rope_theta: 50000" in capsys.readouterr().out


TOLERANCE = 1e-5


def test_another_engine_switches_alike(pool: WorkerPool, shards: str, tmp_path: Path) -> None:
    base = recipe(
        shards,
        tmp_path / "one",
        steps=4,
        stages=(StageConfig(share=0.5, seq_len=SHORT), STAGES[1].model_copy(update={"share": 0.5})),
    )
    base = base.model_copy(update={"optim": OptimConfig(lr=3e-3, eps=1e-3)})
    assert run_training(base).finished
    other = base.model_copy(update={"engine": MegatronEngineConfig(pipeline_parallel=2), "out": str(tmp_path / "two")})
    assert all(result.finished for result in pool.run(run_training, 2, other))
    one, two = (masters(Path(made.out) / "checkpoints" / "step-000004") for made in (base, other))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=TOLERANCE, atol=TOLERANCE)
