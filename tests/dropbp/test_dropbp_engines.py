"""Fifty steps of random masks on every engine and layout: nothing hangs, and the result is that of one process."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hcx.data.batch import MicroBatch
from hcx.dist import rehearsal
from hcx.dropbp import DropBP, DropBPConfig, Trained
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.errors import ConfigError
from hcx.model.adapters import LoRA, LoRAConfig
from hcx.model.config import ModelConfig
from hcx.model.meta import ForwardMeta
from hcx.model.transforms import ModelTransform
from hcx.model.weights import InitWeights
from hcx.optim import OptimConfig
from hcx.testing.batches import packed_rows, take_rows
from hcx.testing.workers import WorkerPool, session_pool
from hcx.train import NextToken

AnyEngine = TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig

STEPS = 50
RATES = (0.5, 0.875)
MICRO_BATCHES = 4
"""Of one row each, over all replicas."""
STAGES = 2
MODEL = ModelConfig(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=24,
    num_layers=8,
    num_heads=2,
    num_kv_heads=2,
    max_seq_len=16,
    initializer_range=0.1,
)
# A large eps: with 1e-8, gradients at rounding level become updates of full size. Over 50 steps the orders of sums
# in which the layouts differ then stay below this.
OPTIM = OptimConfig(kind="adamw", lr=2e-3, eps=1e-3, weight_decay=0.01)
TOLERANCE = 2e-5
ADAPTER = LoRAConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
"""Updates in attention only: some masks then leave a micro-batch, or a stage, without any gradient."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout, and what is trained on it."""

    engine: AnyEngine
    rate: float
    adapter: LoRAConfig | None = None
    steps: int = STEPS
    probe: bool = False
    stages: int = STAGES

    @property
    def ranks(self) -> int:
        engine = self.engine
        model = engine.tensor_parallel * engine.pipeline_parallel if isinstance(engine, MegatronEngineConfig) else 1
        return model * (engine.data_parallel or 1)


class OfReplicas(DropBP):
    """The masks of several replicas in one process: each of them counts its micro-batches from 0."""

    replicas = 1

    def context(self, step: int, micro_batch: int, meta: ForwardMeta) -> ForwardMeta:
        return super().context(step, micro_batch % (MICRO_BATCHES // self.replicas), meta)


@dataclasses.dataclass
class Course:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    rates: list[float]
    sensitivity: tuple[float, ...]


def course(case: Case, replicas: int = 1) -> Course:
    """The run of this rank; with `replicas`, of all of them in one process."""
    if isinstance(case.engine, MegatronEngineConfig):
        rehearsal.enable()
    config = DropBPConfig(
        rate=case.rate, stages=case.stages, allocation="sensitivity" if case.probe else "uniform", probe_at=0.5
    )
    trained = Trained() if case.adapter is None else Trained.updates(case.adapter, MODEL)
    dropbp = OfReplicas(config, MODEL, steps=case.steps, seed=6, trained=trained)
    dropbp.replicas = replicas
    transforms: list[ModelTransform] = [dropbp]
    if case.adapter is not None:
        transforms.insert(0, LoRA(case.adapter, 1))
    engine = build_engine(case.engine, MODEL, OPTIM, transforms, InitWeights(MODEL, 2), 2)
    place, objective = engine.topology, NextToken()
    share = MICRO_BATCHES // place.dp_size
    result = Course([], [], {}, [], ())
    for step in range(case.steps):
        rows = packed_rows(MICRO_BATCHES, 16, MODEL.vocab_size, seed=step)
        mine = [take_rows(rows, i, i + 1) for i in range(place.dp_rank * share, (place.dp_rank + 1) * share)]
        mine = [batch.to(engine.device) for batch in mine]
        dropbp.before_step(step)
        # In one process the probe reads the same rows as the replicas do together.
        firsts = mine[:1] if replicas == 1 else mine[:: MICRO_BATCHES // replicas]

        def gradients(visit: Any, rows: int = 1, step: int = step, batches: list[MicroBatch] = firsts) -> float:
            return engine.gradients(StepBatch(step, [b.heaviest(rows) for b in batches]), objective, visit)

        dropbp.probe(step, gradients)
        stats = engine.train_step(StepBatch(step, mine), objective, 1.0)
        result.losses.append(stats.loss)
        result.norms.append(stats.grad_norm)
        result.rates.append(dropbp.after_step(step, engine)["dropbp/rate"])
    result.weights = {name: tensor.clone() for name, tensor in engine.export_state()}
    result.sensitivity = dropbp.sensitivity
    engine.close()
    return result


@cache
def one_process(case: Case, replicas: int) -> Course:
    return course(case, replicas)


LAYOUTS: dict[str, AnyEngine] = {
    "ddp2": TorchEngineConfig(data_parallel=2),
    "zero1": DeepSpeedEngineConfig(data_parallel=2, zero_stage=1),
    "zero2": DeepSpeedEngineConfig(data_parallel=2, zero_stage=2),
    "zero3": DeepSpeedEngineConfig(data_parallel=2, zero_stage=3),
    "zero1-offload": DeepSpeedEngineConfig(data_parallel=2, zero_stage=1, offload_optimizer="cpu"),
    "zero2-offload": DeepSpeedEngineConfig(data_parallel=2, zero_stage=2, offload_optimizer="cpu"),
    "zero3-offload": DeepSpeedEngineConfig(data_parallel=2, zero_stage=3, offload_optimizer="cpu"),
    "megatron-dp2": MegatronEngineConfig(data_parallel=2),
    "megatron-dp2-distopt": MegatronEngineConfig(data_parallel=2, distributed_optimizer=True),
    "tp2": MegatronEngineConfig(tensor_parallel=2),
    "tp2-sp": MegatronEngineConfig(tensor_parallel=2, sequence_parallel=True),
    "pp2": MegatronEngineConfig(pipeline_parallel=2),
    "tp2-pp2": MegatronEngineConfig(tensor_parallel=2, pipeline_parallel=2),
}
QUICK = ("zero2", "megatron-dp2", "pp2")


def marked(names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="session")
def pool() -> WorkerPool:
    return session_pool()


def assert_same(found: list[Course], expected: Course) -> None:
    assert len(set(expected.losses)) == len(expected.losses)
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-3, abs=1e-6)
        assert rank.rates == expected.rates
        assert rank.weights.keys() == expected.weights.keys()
        for name, weight in expected.weights.items():
            torch.testing.assert_close(rank.weights[name], weight, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def compare(pool: WorkerPool, case: Case) -> None:
    expected = one_process(dataclasses.replace(case, engine=TorchEngineConfig()), case.engine.data_parallel or 1)
    found = pool.run(course, case.ranks, case, timeout_s=600)
    assert_same(found, expected)
    if case.probe:
        for rank in found:
            assert rank.sensitivity == pytest.approx(expected.sensitivity, rel=0.02)


@pytest.mark.parametrize("layout", marked(QUICK))
@pytest.mark.parametrize("rate", [pytest.param(0.5, marks=pytest.mark.slow), 0.875])
def test_fifty_steps_of_random_masks_equal_one_process(pool: WorkerPool, layout: str, rate: float) -> None:
    compare(pool, Case(LAYOUTS[layout], rate))


@pytest.mark.parametrize("layout", marked(("zero2", "pp2")))
def test_steps_whose_trained_branches_were_all_dropped_neither_hang_nor_differ(pool: WorkerPool, layout: str) -> None:
    compare(pool, Case(LAYOUTS[layout], 0.875, ADAPTER, steps=20))


@pytest.mark.parametrize("layout", marked(("pp2", "zero3-offload")))
def test_every_layout_measures_the_same_sensitivities_and_goes_on_with_the_same_rates(
    pool: WorkerPool, layout: str
) -> None:
    compare(pool, Case(LAYOUTS[layout], 0.5, steps=8, probe=True))


def test_chunks_of_an_interleaved_pipeline_each_drop_equally_and_are_probed(pool: WorkerPool) -> None:
    # The probe's single micro-batch is filled up to a group; dropped sublayers are not computed again.
    engine = MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2, activation_checkpointing=True)
    compare(pool, Case(engine, 0.5, steps=6, stages=4, probe=True))


def test_the_masks_of_the_course_change_and_drop_equally_many_in_both_stages() -> None:
    for rate in RATES:
        dropbp = DropBP(DropBPConfig(rate=rate, stages=STAGES), MODEL, steps=STEPS, seed=6)
        masks = [dropbp.schedule.mask(step, micro) for step in range(STEPS) for micro in range(2)]
        half = len(masks[0]) // 2
        assert {(sum(mask[:half]), sum(mask[half:])) for mask in masks} == {(half * rate, half * rate)}
        assert len(set(masks)) > STEPS / 2
    # Some drop all of attention, so that with updates there alone nothing is trained in a micro-batch.
    assert any(all(mask[::2]) for mask in masks)


def refused(engine: AnyEngine) -> str:
    rehearsal.enable()
    dropbp = DropBP(DropBPConfig(rate=0.5, stages=1), MODEL, steps=1, seed=0)
    try:
        build_engine(engine, MODEL, OPTIM, [dropbp], InitWeights(MODEL, 0), 0)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_masks_that_do_not_respect_pipeline_stages_are_refused(pool: WorkerPool) -> None:
    for message in pool.run(refused, 2, LAYOUTS["pp2"]):
        assert "dropbp.stages = 1: must be a multiple of engine.pipeline_parallel = 2, so that" in message
    interleaved = MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2)
    for message in pool.run(refused, 2, interleaved):
        assert "engine.pipeline_parallel = 2 x virtual_pipeline_parallel = 2, so that" in message
