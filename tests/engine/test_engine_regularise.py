"""Regularisation events are the same on every engine and layout, and the next forward sees them."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from hcx.compress.regularise import Regularise, RegulariseConfig
from hcx.compress.regularise.config import BCQRule, NoiseRule, PruneRule
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.model.config import ModelConfig
from hcx.testing import regularised, seam
from hcx.testing.regularised import EVERY_RULE, PERIOD, STEPS, RegularisedResult
from hcx.testing.seam import SeamCase
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool

TOLERANCE = 1e-5
MOVED = 2e-3
"""Share of weights that may differ after an event on trained weights: rounding in the sums over ranks moves a weight
across the border between two codes, now and then."""
LAYOUTS = {
    "ddp2": TorchEngineConfig(),
    "zero0": DeepSpeedEngineConfig(zero_stage=0),
    "zero1": DeepSpeedEngineConfig(zero_stage=1),
    "zero2": DeepSpeedEngineConfig(zero_stage=2),
    "zero3": DeepSpeedEngineConfig(zero_stage=3),
    "tp2": MegatronEngineConfig(tensor_parallel=2),
    "pp2": MegatronEngineConfig(pipeline_parallel=2),
    "pp2-vp2": MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2),
    "dp2-distopt": MegatronEngineConfig(distributed_optimizer=True),
}
LATER = ("zero1", "zero2", "dp2-distopt")
"""Layouts whose test belongs to make test-long: others go the same way."""
MODEL = tiny_config(tie_embeddings=True)
DEEP = tiny_config(tie_embeddings=True, num_layers=4)
"""For the layout whose stages hold two chunks each."""


def case(engine: object | None = None, model: ModelConfig = MODEL) -> SeamCase:
    base = SeamCase(TorchEngineConfig(), model, lora=False, probe=False)
    return base if engine is None else base.on(engine)  # type: ignore[arg-type]


@cache
def reference(model: ModelConfig = MODEL) -> RegularisedResult:
    return regularised.run(case(model=model), EVERY_RULE)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in LAYOUTS]
)
def test_events_on_any_layout_equal_those_of_one_process(pool: WorkerPool, layout: str) -> None:
    model = DEEP if layout == "pp2-vp2" else MODEL
    expected = reference(model)
    found = pool.run(regularised.run, 2, case(LAYOUTS[layout], model), EVERY_RULE)
    for result in found:
        # On untouched weights bit for bit, whatever was gathered and scattered.
        for name, weight in expected.weights[PERIOD].items():
            assert torch.equal(result.weights[PERIOD][name], weight), name
        # The step after it computes with what the event left.
        assert result.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        for name, weight in expected.weights[STEPS].items():
            away = (result.weights[STEPS][name] - weight).abs() > TOLERANCE + TOLERANCE * weight.abs()
            assert float(away.float().mean()) <= MOVED, name
        for mine, theirs in zip(result.metrics, expected.metrics, strict=True):
            assert mine.keys() == theirs.keys()
            for key in ("regularise/event_size", "regularise/strength", "regularise/events"):
                assert mine.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-3)
    first, second = (result.weights for result in found)
    for step in (PERIOD, STEPS):
        assert all(torch.equal(first[step][name], second[step][name]) for name in first[step])
    # Rank 0 alone keeps the planes, and they are the masters.
    assert found[1].packed == {}
    for stem, dense in found[0].packed.items():
        assert torch.equal(dense, first[STEPS][f"{stem}.weight"])
    assert {stem.rsplit(".", 1)[1] for stem in found[0].packed} == {"q_proj", "k_proj", "gate_proj"}


def test_events_come_when_due_and_are_measured() -> None:
    result = reference()
    assert [bool(metrics) for metrics in result.metrics] == [False, True, False, True]
    start = seam.SeamWeights(MODEL, 3)
    rules = EVERY_RULE.rules([name.removesuffix(".weight") for name in result.weights[PERIOD]])
    moved = size = 0.0
    for name, weight in result.weights[PERIOD].items():
        before = start.tensor(name, tuple(weight.shape))
        if name.removesuffix(".weight") in rules:
            moved += float((weight - before).double().square().sum())
            size += float(before.double().square().sum())
        else:
            assert torch.equal(weight, before), name
    metrics = result.metrics[PERIOD - 1]
    assert metrics["regularise/event_size"] == pytest.approx((moved / size) ** 0.5, rel=1e-9)
    assert metrics["regularise/strength"] == pytest.approx(metrics["regularise/event_size"] / PERIOD)
    assert metrics["regularise/cost"] > 0
    assert [m.get("regularise/events") for m in result.metrics] == [None, 1.0, None, 2.0]


def test_after_an_event_weights_are_what_the_rules_say() -> None:
    for weights in reference().weights.values():
        down = torch.cat([weights[f"model.layers.{layer}.mlp.down_proj.weight"].flatten() for layer in range(2)])
        assert int((down == 0).sum()) == round(0.6 * down.numel())
        # One threshold for both blocks: they are not pruned alike.
        embedding = weights["model.embed_tokens.weight"]
        assert int((embedding == 0).sum()) == embedding.numel() // 2
        up = weights["model.layers.1.mlp.up_proj.weight"].double()
        for tile in up.split(32):
            values = torch.linalg.svdvals(tile)
            assert (values[4:] < 1e-6 * values[0]).all()
        query = weights["model.layers.0.self_attn.q_proj.weight"]
        assert max(len(row.unique()) for group in query.split(16, 1) for row in group) <= 4


@pytest.mark.parametrize(
    ("config", "total_steps"),
    [
        (RegulariseConfig(period=100), 1000),
        (RegulariseConfig(period=1, default=NoiseRule(amplitude=0.0)), STEPS),
        (RegulariseConfig(period=2, default=PruneRule(fraction=0.0)), STEPS),
    ],
    ids=["no events", "noise of zero", "pruning nothing"],
)
def test_without_events_or_with_the_identity_training_is_bit_identical_to_plain(
    config: RegulariseConfig, total_steps: int
) -> None:
    never = RegulariseConfig(period=10_000)
    plain = regularised.run(case(), never, quiet=0, total_steps=10_000)
    found = regularised.run(case(), config, quiet=0, total_steps=total_steps)
    assert found.losses == plain.losses
    assert all(torch.equal(found.weights[STEPS][name], weight) for name, weight in plain.weights[STEPS].items())
    changed = regularised.run(case(), RegulariseConfig(period=1), quiet=0)
    assert changed.losses[1:] != plain.losses[1:]


def straight_through(engine: object | None = None) -> RegularisedResult:
    config = RegulariseConfig(
        method="straight_through", default=BCQRule(bits=2, group_size=16, method="greedy", rounds=0, final_rounds=0)
    )
    return regularised.run(case(engine), config, quiet=PERIOD)


def test_straight_through_layers_compute_compressed_from_the_first_step_and_keep_latent_weights() -> None:
    result = straight_through()
    assert [bool(metrics) for metrics in result.metrics] == [False, False, False, True]
    # Events at every step leave the same weights for the first two forwards: nothing has been learnt yet.
    every = RegulariseConfig(period=1, default=BCQRule(bits=2, group_size=16, method="greedy", rounds=0))
    one = regularised.run(case(), every)
    assert result.losses[1] == pytest.approx(one.losses[1], rel=1e-6)
    assert result.losses[0] != pytest.approx(one.losses[0], rel=1e-6)
    plain = regularised.run(case(), RegulariseConfig(period=10_000), total_steps=10_000)
    assert result.losses[0] != pytest.approx(plain.losses[0], rel=1e-6)


@pytest.mark.parametrize("layout", ["tp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "pp2"))])
def test_straight_through_training_is_the_same_on_any_layout(pool: WorkerPool, layout: str) -> None:
    expected = straight_through()
    for result in pool.run(straight_through, 2, LAYOUTS[layout]):
        assert result.losses == pytest.approx(expected.losses, rel=TOLERANCE)


def test_the_last_event_is_made_also_where_the_last_step_makes_no_update() -> None:
    config = RegulariseConfig(period=1, default=BCQRule(bits=2, group_size=16))
    transform = Regularise(config, MODEL, STEPS, lr=lambda _: 0.01, lr_factor=lambda _: 1.0)
    engine = build_engine(case().engine, MODEL, case().optim, [transform], seam.SeamWeights(MODEL, 3), 3)
    events = []
    for step in range(STEPS):
        # Steps 1 and 3 are refused: every loss is above their limit.
        limit = 0.0 if step in (1, 3) else float("inf")
        transform.before_step(step)
        batch = StepBatch(step, seam.global_batch(MODEL, step), max_loss=limit)
        assert engine.train_step(batch, seam.WeightedNextToken(), 1.0).skipped == (limit == 0.0)
        events.append(bool(transform.after_step(step, engine)))
    assert events == [True, False, True, True]
    transform.finalize(engine)
    weights = dict(engine.export_state())
    assert len(transform.packed) == 14
    for stem, packed in transform.packed.items():
        assert torch.equal(packed.dequantize(), weights[f"{stem}.weight"])
    # A state taken now knows that the run has had its last event.
    again = Regularise(config, MODEL, STEPS, lr=lambda _: 0.01, lr_factor=lambda _: 1.0)
    again.load_state_dict(transform.state_dict())
    again.finalize(engine)
    assert again.packed == {}
    engine.close()
