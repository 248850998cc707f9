"""Tuning on conversations: one gradient whatever the batches, and one run on every engine and layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hcx.data.chat_rows import ChatSource, Conversation
from hcx.data.chat_samples import ChatSamples, encode_conversations
from hcx.data.token_budget import TokenBudgetLoader
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.model.adapters import LoRAConfig
from hcx.model.weights import InitWeights
from hcx.optim import OptimConfig
from hcx.recipe.run import run_training
from hcx.recipe.train import ChatSection, TrainRecipe
from hcx.testing.tiny import TINY_TEXT, tiny_config, tiny_model_directory
from hcx.testing.workers import WorkerPool
from hcx.tokenizer import train_tokenizer
from hcx.train import SFT
from hcx.train.trainer import TrainerConfig

TOLERANCE = 1e-5
"""Relative to the largest gradient, or to the value: fp32 sums in another order."""
BUDGET = 192
MODEL = tiny_config(initializer_range=0.05)
ENGINES: dict[str, Any] = {
    "dp2": TorchEngineConfig(data_parallel=2),
    "tp2": MegatronEngineConfig(tensor_parallel=2),
    "tp2-sp": MegatronEngineConfig(tensor_parallel=2, sequence_parallel=True),
    "pp2": MegatronEngineConfig(pipeline_parallel=2),
    "zero3": DeepSpeedEngineConfig(zero_stage=3, data_parallel=2),
}


def conversations(count: int) -> list[tuple[dict[str, str], ...]]:
    """One to three turns, of many lengths."""
    found = []
    for number in range(count):
        turns = []
        for turn in range(1 + number % 3):
            text = TINY_TEXT[(number + turn) % 5]
            turns += [
                {"role": "user", "content": text[: 4 + number % 9]},
                {"role": "assistant", "content": text[turn : turn + 3 + 2 * (number % 17)]},
            ]
        found.append(tuple(turns))
    return found


def tiny_samples() -> ChatSamples:
    given = [Conversation(turns, "test", "here") for turns in conversations(40)]
    return encode_conversations(given, train_tokenizer(TINY_TEXT, 384), BUDGET)


def gradients(engine_kind: str, step: int, giant: bool) -> dict[str, Tensor]:
    """Gradients of one step of token-budget batches on this rank's engine, or of all its samples as one giant batch."""
    samples = tiny_samples()
    loader = TokenBudgetLoader(samples, 4 * BUDGET, BUDGET, seed=2, window=8)
    config: Any = TorchEngineConfig() if engine_kind == "torch" else DeepSpeedEngineConfig(zero_stage=3)
    engine = build_engine(config, MODEL, OptimConfig(), (), InitWeights(MODEL, 3), 3)
    place = engine.topology
    if giant:
        plan = loader.step_plan(step)
        batches = [samples.micro_batch(plan.samples.tolist(), len(plan.samples), int(samples.lengths.max()))]
    else:
        batches = loader.step_batch(step, place.dp_rank, place.dp_size)
    found: dict[str, Tensor] = {}
    on_device = [batch.to(engine.device) for batch in batches]
    engine.gradients(StepBatch(0, on_device), SFT(), lambda name, g: found.__setitem__(name, g.cpu().clone()))
    engine.close()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    assert scale > 0
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) <= TOLERANCE * scale, name


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_gradient_of_token_budget_batches_is_that_of_one_giant_batch(step: int) -> None:
    assert_close(gradients("torch", step, giant=False), gradients("torch", step, giant=True))


@pytest.mark.parametrize("engine_kind", ["torch", "zero3"])
def test_two_replicas_have_the_gradient_of_one_giant_batch(pool: WorkerPool, engine_kind: str) -> None:
    expected = gradients("torch", 1, giant=True)
    for found in pool.run(gradients, 2, engine_kind, 1, False):
        assert_close(found, expected)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sft")
    tiny_model_directory(path / "base", initializer_range=0.05)
    rows = [json.dumps({"messages": list(turns)}, ensure_ascii=False) for turns in conversations(60)]
    (path / "chat.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def recipe(directory: Path, name: str, adapter: LoRAConfig | None) -> TrainRecipe:
    return TrainRecipe(
        name=name,
        out=str(directory / name),
        model=MODEL,
        init_from=str(directory / "base"),
        data=ChatSection(
            sources=(ChatSource(path=str(directory / "chat.jsonl")),), seq_len=128, validation_fraction=0.1
        ),
        adapter=adapter,
        train=TrainerConfig(steps=8, global_batch=4 * BUDGET, micro_batch=BUDGET, validate_every=4, checkpoint_every=4),
        optim=OptimConfig(kind="adamw", lr=3e-3, eps=1e-3, weight_decay=0.0),
        engine=TorchEngineConfig(),
    )


ADAPTERS = {"all weights": None, "lora": LoRAConfig(rank=4, alpha=8.0)}


@pytest.fixture(scope="module", params=ADAPTERS)
def one_process(request: pytest.FixtureRequest, directory: Path) -> TrainRecipe:
    """Eight steps in one process; more than an epoch, so that an epoch's last, smaller step is among them."""
    run = recipe(directory, f"one {request.param}", ADAPTERS[request.param])
    assert run_training(run).finished
    return run


def metrics(out: str) -> list[dict[str, float]]:
    """What does not depend on time, by step; events (starts, endings) are not part of what was computed."""
    lines = Path(out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "event" not in row]
    return [
        {key: value for key, value in row.items() if key not in ("time",) and "throughput" not in key} for row in rows
    ]


def written(out: str) -> dict[str, Tensor]:
    files = [*sorted(Path(out, "model").glob("*.safetensors")), *sorted(Path(out, "adapter").glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("layout", ENGINES)
def test_a_recipe_on_conversations_gives_one_curve_and_one_model_on_every_engine(
    pool: WorkerPool, one_process: TrainRecipe, layout: str
) -> None:
    out = f"{one_process.out} {layout}"
    other = one_process.model_copy(update={"engine": ENGINES[layout], "out": out})
    assert all(result.finished for result in pool.run(run_training, 2, other))
    rows, expected = metrics(out), metrics(one_process.out)
    assert len(rows) == len(expected) == 11
    assert sum("validation/loss/chat" in row for row in rows) == 3
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE)
    found, wanted_weights = written(out), written(one_process.out)
    assert found.keys() == wanted_weights.keys()
    assert any("lora_A" in name for name in found) == (one_process.adapter is not None)
    for name, tensor in wanted_weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_run_on_conversations_goes_on_on_another_engine(pool: WorkerPool, one_process: TrainRecipe) -> None:
    out = f"{one_process.out} resumed"
    other = one_process.model_copy(update={"engine": ENGINES["tp2"], "out": out})
    checkpoint = str(Path(one_process.out, "checkpoints", "step-000004"))
    assert all(result.finished for result in pool.run(run_training, 2, other, checkpoint))
    for name, tensor in written(one_process.out).items():
        torch.testing.assert_close(written(out)[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)
