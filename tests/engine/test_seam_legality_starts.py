"""Legality agrees with what starts: with refusals switched off, a combination is right if and only if it is legal."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hcx.dist import rehearsal
from hcx.engine import build
from hcx.engine.base import StepBatch
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.engine.footprint import AnyEngineConfig
from hcx.engine.legality import nearest_legal, violations
from hcx.model.config import ModelConfig
from hcx.optim import OptimConfig
from hcx.testing import seam
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool

STEPS = 2
HANGS_S = 6.0
"""A combination takes a fifth of a second."""
SEQ = seam.SEQ
MODELS = {
    "even": tiny_config(),
    "three blocks": tiny_config(num_layers=3),
    "one key head": tiny_config(num_kv_heads=1),
    "odd vocabulary": tiny_config(vocab_size=97),
    "odd width": tiny_config(intermediate_size=33),
    "four blocks": tiny_config(num_layers=4),
}
OPTIMIZERS = {
    "adamw": OptimConfig(lr=1e-2, eps=1e-3),
    "sgd": OptimConfig(kind="sgd", lr=1e-2),
    "muon": OptimConfig(kind="muon", lr=1e-2),
}


def engines(world_size: int, every_flag: bool) -> list[AnyEngineConfig]:
    """Every layout up to twice the processes; and every flag, or each flag alone on all processes."""
    found: list[AnyEngineConfig] = [TorchEngineConfig()]
    found += [DeepSpeedEngineConfig(zero_stage=stage) for stage in (0, 1, 2, 3)]
    sizes = [size for size in (1, 2, 3, 4) if size <= 2 * world_size]
    for tp, pp in itertools.product(sizes, sizes):
        for sp, distributed in itertools.product((False, True), (False, True)):
            if tp * pp > 2 * world_size:
                continue
            if every_flag or not (sp or distributed) or (tp * pp in (1, world_size) and sp != distributed):
                found.append(
                    MegatronEngineConfig(
                        tensor_parallel=tp,
                        pipeline_parallel=pp,
                        sequence_parallel=sp,
                        distributed_optimizer=distributed,
                    )
                )
    return found


def interleaved(world_size: int) -> list[AnyEngineConfig]:
    """Layouts of several chunks per stage."""
    sizes = [size for size in (1, 2, 4) if size <= 2 * world_size]
    return [
        MegatronEngineConfig(pipeline_parallel=pp, virtual_pipeline_parallel=chunks)
        for pp, chunks in itertools.product(sizes, (2, 3))
    ]


def combinations(world_size: int, every_flag: bool = False) -> list[tuple[str, str, AnyEngineConfig]]:
    """(model, optimizer, engine): all models with adamw, all optimizers with the even model."""
    others = [model for model in MODELS if model != "four blocks"]
    pairs = [(model, "adamw") for model in others] + [("even", "sgd"), ("even", "muon")]
    flags = {pair: every_flag or pair == ("even", "adamw") for pair in pairs}
    found = [(*pair, engine) for pair in pairs for engine in engines(world_size, flags[pair])]
    chunks: list[tuple[str, str, AnyEngineConfig]]
    chunks = [("four blocks", "adamw", engine) for engine in interleaved(world_size)]
    if every_flag:
        return found + chunks
    # The shortest list that tries every rule: what divides is asked of plain layouts, flags of the even model.
    plain = [c for c in found if c[0] != "even" and not getattr(c[2], "sequence_parallel", False)]
    plain = [c for c in plain if c[2].kind == "megatron" and not c[2].distributed_optimizer]
    return [c for c in found if c[0] == "even" and (c[1] == "adamw" or c[2].kind != "torch")] + plain + chunks


def losses(model: ModelConfig, optim: OptimConfig, engine: AnyEngineConfig) -> list[float]:
    if engine.kind == "megatron":
        rehearsal.enable()
    built = build.build_engine(engine, model, optim, (), seam.SeamWeights(model, 3), 3)
    place = built.topology
    share = seam.GLOBAL_BATCH // place.dp_size
    found = []
    for step in range(STEPS):
        rows = seam.global_batch(model, step)[place.dp_rank * share :][:share]
        found.append(built.train_step(StepBatch(step, rows), seam.WeightedNextToken(), 1.0).loss)
    built.close()
    return found


def tried(chosen: list[tuple[str, str, AnyEngineConfig]]) -> list[Any]:
    """The losses of each combination, or why it does not start; legality is not asked."""
    import hcx.engine.deepspeed_engine
    import hcx.engine.megatron_engine

    modules = (build, hcx.engine.deepspeed_engine, hcx.engine.megatron_engine)
    kept = [module.require_legal for module in modules]
    for module in modules:
        module.require_legal = lambda *arguments, **named: None  # type: ignore[attr-defined]
    answers: list[Any] = []
    try:
        for model, optimizer, engine in chosen:
            try:
                answers.append(losses(MODELS[model], OPTIMIZERS[optimizer], engine))
            except Exception as error:
                answers.append(f"{type(error).__name__}: {error}")
    finally:
        for module, function in zip(modules, kept, strict=True):
            module.require_legal = function  # type: ignore[attr-defined]
    return answers


def has_stages(engine: AnyEngineConfig, world_size: int) -> bool:
    """Whether there are processes enough for a pipeline of several stages."""
    if engine.kind != "megatron" or engine.pipeline_parallel == 1:
        return False
    return engine.tensor_parallel * engine.pipeline_parallel <= world_size


def hung_or_tried(pool: WorkerPool, world_size: int, one: tuple[str, str, AnyEngineConfig]) -> list[Any]:
    """Each rank's answer; a combination that hangs does not start either."""
    try:
        return [answers[0] for answers in pool.run(tried, world_size, [one], timeout_s=HANGS_S)]
    except TimeoutError as error:
        pool.run(tried, world_size, [("even", "adamw", MegatronEngineConfig())])  # the next one waits for no imports
        return [str(error)]


def check(pool: WorkerPool, world_size: int, every_flag: bool) -> None:
    chosen = combinations(world_size, every_flag)
    wanted = {
        (model, optimizer): losses(MODELS[model], OPTIMIZERS[optimizer], TorchEngineConfig())
        for model, optimizer in {(model, optimizer) for model, optimizer, _ in chosen}
    }
    legality = [
        not violations(engine, MODELS[model], world_size, SEQ, optimizer) for model, optimizer, engine in chosen
    ]
    # Where one stage fails, the others wait for it: such combinations are tried alone, in little time.
    alone = [not legal and has_stages(c[2], world_size) for c, legal in zip(chosen, legality, strict=True)]
    together = [c for c, apart in zip(chosen, alone, strict=True) if not apart]
    found = iter(zip(*pool.run(tried, world_size, together, timeout_s=900.0), strict=True))
    verdicts = []
    for (model, optimizer, engine), legal, apart in zip(chosen, legality, alone, strict=True):
        answers = hung_or_tried(pool, world_size, (model, optimizer, engine)) if apart else next(found)
        right = all(
            isinstance(answer, list) and answer == pytest.approx(wanted[model, optimizer], rel=1e-5, abs=1e-5)
            for answer in answers
        )
        assert legal == right, f"{model}, {optimizer}, {engine!r}: legal {legal}, but {answers[0]}"
        verdicts.append(legal)
    # Both kinds were among them.
    assert min(verdicts.count(True), verdicts.count(False)) > 10


def test_a_combination_on_two_processes_is_right_if_and_only_if_it_is_legal(pool: WorkerPool) -> None:
    check(pool, 2, every_flag=False)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_combination_is_right_if_and_only_if_it_is_legal(pool: WorkerPool, world_size: int) -> None:
    check(pool, world_size, every_flag=True)


@pytest.mark.parametrize("world_size", [1, 2, 4, 6, 8])
def test_the_nearest_legal_layout_is_legal_and_of_the_same_kind(world_size: int) -> None:
    for model, optimizer, engine in combinations(4, every_flag=True):
        near = nearest_legal(engine, MODELS[model], world_size, SEQ, optimizer)
        if optimizer == "muon" and engine.kind != "torch":
            assert near is None
            continue
        assert near is not None
        assert near.kind == engine.kind
        assert violations(near, MODELS[model], world_size, SEQ, optimizer) == []
        if not violations(engine, MODELS[model], world_size, SEQ, optimizer):
            assert near == engine
