"""The bytes that plans count are those that the libraries allocate, padding included, on every rank."""

from __future__ import annotations

import pytest

from hcx.engine.base import StepBatch
from hcx.engine.common import storage_bytes
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.engine.footprint import AnyEngineConfig, held_bytes
from hcx.model.config import ModelConfig
from hcx.optim import GroupRule, OptimConfig
from hcx.testing import seam
from hcx.testing.seam import SeamCase
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool

ODD = {"hidden_size": 17, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 33, "vocab_size": 97}
"""Nothing divides anything: every padding shows."""
RULES = OptimConfig(rules=(GroupRule(pattern="*embed_tokens*", lr_mult=0.5), GroupRule(pattern="*norm*", lr_mult=2.0)))
EVEN = tiny_config("hyperclovax", vocab_size=390, num_layers=4)

REPLICAS: list[AnyEngineConfig] = [
    TorchEngineConfig(),
    *(DeepSpeedEngineConfig(zero_stage=stage) for stage in (0, 1, 2, 3)),
    *(DeepSpeedEngineConfig(zero_stage=stage, offload_optimizer="cpu") for stage in (1, 2, 3)),
    MegatronEngineConfig(),
    MegatronEngineConfig(distributed_optimizer=True),
]
SPLIT: list[AnyEngineConfig] = [
    MegatronEngineConfig(tensor_parallel=2),
    MegatronEngineConfig(tensor_parallel=2, sequence_parallel=True, distributed_optimizer=True),
    MegatronEngineConfig(pipeline_parallel=2),
    MegatronEngineConfig(pipeline_parallel=2, distributed_optimizer=True),
    MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2),
    MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2, distributed_optimizer=True),
]
BUFFERED = ("torch", "megatron", 3)
"""Engines that keep gradients in a buffer of their own: that is counted exactly too."""


def precisions(engine: AnyEngineConfig) -> list[AnyEngineConfig]:
    low = engine.model_copy(update={"precision": "bf16"})
    return [engine] if isinstance(engine, DeepSpeedEngineConfig) and engine.zero_stage < 2 else [engine, low]


def held(cases: list[SeamCase]) -> list[tuple[int, int, dict[str, int]]]:
    """(stage, replica, bytes by kind) of this rank after a step of each case."""
    found = []
    for case in cases:
        engine = seam.start(case)
        place = engine.topology
        share = seam.GLOBAL_BATCH // place.dp_size
        rows = seam.global_batch(case.model, 0)[place.dp_rank * share :][:share]
        engine.train_step(StepBatch(0, rows), seam.WeightedNextToken(), 1.0)
        found.append((place.pp_rank, place.dp_rank, storage_bytes(engine.held_tensors())))
        engine.close()
    return found


def cases(engines: list[AnyEngineConfig], model: ModelConfig, optim: OptimConfig) -> list[SeamCase]:
    return [SeamCase(e, model, optim, lora=False) for engine in engines for e in precisions(engine)]


def check(pool: WorkerPool, world_size: int, chosen: list[SeamCase]) -> None:
    for rank, of_rank in enumerate(pool.run(held, world_size, chosen)):
        for case, (pp_rank, dp_rank, measured) in zip(chosen, of_rank, strict=True):
            planned = held_bytes(case.engine, case.model, case.optim, world_size, pp_rank, dp_rank)
            where = f"rank {rank}: {case.engine!r}"
            assert measured["weights"] == planned.weights, where
            assert measured["optimizer"] == planned.optimizer, where
            if case.engine.kind in BUFFERED or getattr(case.engine, "zero_stage", None) in BUFFERED:
                assert measured["gradients"] == planned.gradients, where


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_replicas_of_a_model_that_divides_nothing(pool: WorkerPool, tied: bool) -> None:
    check(pool, 2, cases(REPLICAS, tiny_config(**ODD, tie_embeddings=tied), RULES))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_stages_and_tensor_parallel_ranks(pool: WorkerPool, tied: bool) -> None:
    check(pool, 2, cases(SPLIT, EVEN.model_copy(update={"tie_embeddings": tied}), OptimConfig()))


def test_other_optimizers_keep_other_state(pool: WorkerPool) -> None:
    model = tiny_config(**ODD)
    chosen = [
        SeamCase(TorchEngineConfig(), model, OptimConfig(kind="muon"), lora=False),
        SeamCase(DeepSpeedEngineConfig(zero_stage=2), model, OptimConfig(kind="sgd"), lora=False),
        SeamCase(MegatronEngineConfig(), model, OptimConfig(kind="sgd", momentum=0.0), lora=False),
    ]
    check(pool, 2, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4])
def test_more_replicas_and_all_axes_at_once(pool: WorkerPool, world_size: int) -> None:
    check(pool, world_size, cases(REPLICAS[1:] if world_size == 4 else REPLICAS[1:5], tiny_config(**ODD), RULES))
    if world_size == 4:
        both = {"tensor_parallel": 2, "distributed_optimizer": True}
        grid = [MegatronEngineConfig(**both), MegatronEngineConfig(**both, pipeline_parallel=2)]
        tied = EVEN.model_copy(update={"tie_embeddings": True})
        grid += SPLIT[-3::2]
        check(pool, 4, cases(grid, tied, RULES))
