"""Every engine and layout equals one process: steps, probe, scores, edits, swapped sources, checkpoints, exports."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch

from hcx.engine import build
from hcx.engine.base import StepBatch
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.errors import ConfigError, MissingExtra
from hcx.optim import GroupRule, OptimConfig
from hcx.testing import seam
from hcx.testing.seam import SeamCase, SeamResult
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool
from hcx.train.checkpoint import CheckpointReader

TOLERANCE = 1e-5
CLIP = 0.5
TWO_RANKS = {
    "pp2": MegatronEngineConfig(pipeline_parallel=2),
    "pp2-vp2": MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2),
    "tp2": MegatronEngineConfig(tensor_parallel=2),
    "zero3": DeepSpeedEngineConfig(zero_stage=3),
    "tp2-sp": MegatronEngineConfig(tensor_parallel=2, sequence_parallel=True),
    "dp2": MegatronEngineConfig(),
    "dp2-distopt": MegatronEngineConfig(distributed_optimizer=True),
    "zero0": DeepSpeedEngineConfig(zero_stage=0),
    "zero1": DeepSpeedEngineConfig(zero_stage=1),
    "zero2": DeepSpeedEngineConfig(zero_stage=2),
    "zero1-offload": DeepSpeedEngineConfig(zero_stage=1, offload_optimizer="cpu"),
    "zero2-offload": DeepSpeedEngineConfig(zero_stage=2, offload_optimizer="cpu"),
    "zero3-offload": DeepSpeedEngineConfig(zero_stage=3, offload_optimizer="cpu"),
    "ddp2": TorchEngineConfig(),
}
MODELS = {
    "llama": tiny_config("llama"),
    "llama-tied": tiny_config("llama", tie_embeddings=True),
    "hyperclovax": tiny_config("hyperclovax"),
    "hyperclovax-tied": tiny_config("hyperclovax", tie_embeddings=True),
}
MODELS |= {f"{name}-deep": model.model_copy(update={"num_layers": 4}) for name, model in MODELS.items()}
SHALLOW = [name for name in MODELS if not name.endswith("-deep")]
PROVED = ("pp2", "pp2-vp2", "tp2", "zero3")
"""The layouts of the seam proof: every model on each; the others run one model."""


def suited(layout: str, model: str) -> str:
    """The model, with a block for every chunk of an interleaved pipeline."""
    return f"{model}-deep" if layout == "pp2-vp2" else model


def reference_case(model: str, **changes: object) -> SeamCase:
    return SeamCase(TorchEngineConfig(clip_grad_norm=CLIP), MODELS[model], **changes)  # type: ignore[arg-type]


@cache
def reference(model: str) -> SeamResult:
    """One process; probe and scores included."""
    return seam.run(reference_case(model))


@cache
def undisturbed(model: str) -> SeamResult:
    """One process that never probes nor scores."""
    return seam.run(reference_case(model, probe=False))


@cache
def reference_checkpoint(model: str, directory: Path) -> Path:
    seam.run(reference_case(model, probe=False), str(directory))
    return directory / "step-000002"


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_course(found: SeamResult, expected: SeamResult) -> None:
    """Losses, norms, metrics, what the edit saw, and the exported weights."""
    steps = len(found.losses)
    assert steps >= seam.STEPS - seam.EDIT_AFTER
    assert found.losses == pytest.approx(expected.losses[-steps:], rel=TOLERANCE, abs=TOLERANCE)
    assert found.norms == pytest.approx(expected.norms[-steps:], rel=TOLERANCE, abs=TOLERANCE)
    assert found.metrics == expected.metrics[-steps:]
    assert found.edits.keys() == expected.edits.keys() == set(seam.EDITED)
    for name, (master, state) in expected.edits.items():
        assert_same_tensors({"": found.edits[name][0], **found.edits[name][1]}, {"": master, **state})
    assert_same_tensors(found.weights, expected.weights)


def assert_same_probe(found: list[SeamResult], expected: SeamResult) -> None:
    """Gradients and mean loss on every rank; scores of every replica, together those of one process."""
    replicas = {result.dp_rank: result for result in found}
    for result in found:
        assert_same_tensors(result.gradients, expected.gradients)
        assert result.probe_loss == pytest.approx(expected.probe_loss, rel=TOLERANCE)
        assert len(result.scores) == seam.GLOBAL_BATCH // result.dp_size
        assert all(torch.equal(a, b) for a, b in zip(result.scores, replicas[result.dp_rank].scores, strict=True))
    scores = [score for rank in sorted(replicas) for score in replicas[rank].scores]
    for score, other in zip(scores, expected.scores, strict=True):
        torch.testing.assert_close(score, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_scenario_moves_every_trained_weight_and_leaves_frozen_ones() -> None:
    course = reference("llama")
    start = seam.SeamWeights(MODELS["llama"], 3)
    frozen = {f"{stem}.weight" for stem in seam.LORA_STEMS} | {
        # The base of a fused part is frozen as a whole.
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
    }
    for name, weight in course.weights.items():
        if "lora_" in name:
            continue
        moved = not torch.equal(weight, start.tensor(name, tuple(weight.shape)))
        assert moved == (name not in frozen or name in seam.EDITED), name
    assert any("lora_A" in name for name in course.weights)
    assert all(norm > CLIP for norm in course.norms)
    assert len(set(course.losses)) == seam.STEPS


def test_probing_and_scoring_disturb_nothing_in_one_process() -> None:
    assert_same_course(reference("llama"), undisturbed("llama"))


@pytest.mark.parametrize("model", SHALLOW)
@pytest.mark.parametrize("layout", PROVED)
def test_two_ranks_equal_one_process(pool: WorkerPool, layout: str, model: str) -> None:
    model = suited(layout, model)
    found = pool.run(seam.run, 2, reference_case(model).on(TWO_RANKS[layout]))
    for result in found:
        assert_same_course(result, undisturbed(model))
    assert_same_probe(found, reference(model))


@pytest.mark.parametrize("layout", [name for name in TWO_RANKS if name not in PROVED])
def test_further_layouts_equal_one_process(pool: WorkerPool, layout: str) -> None:
    found = pool.run(seam.run, 2, reference_case("hyperclovax-tied").on(TWO_RANKS[layout]))
    for result in found:
        assert_same_course(result, undisturbed("hyperclovax-tied"))
    assert_same_probe(found, reference("hyperclovax-tied"))


def first_gradients(case: SeamCase) -> dict[str, torch.Tensor]:
    """Gradients of the global batch at the initial weights."""
    engine = seam.start(case)
    share = seam.GLOBAL_BATCH // engine.topology.dp_size
    rows = seam.global_batch(case.model, 0)[engine.topology.dp_rank * share :][:share]
    found = {}
    engine.gradients(
        StepBatch(0, rows), seam.WeightedNextToken(), lambda name, grad: found.update({name: grad.clone()})
    )
    engine.close()
    return found


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_gradients_of_any_split_over_ranks_equal_one_process_to_a_millionth(pool: WorkerPool, layout: str) -> None:
    model = MODELS[suited(layout, "hyperclovax-tied")].model_copy(update={"initializer_range": 0.05})
    case = SeamCase(TorchEngineConfig(), model)
    expected = first_gradients(case)
    size = math.hypot(*(float(gradient.norm()) for gradient in expected.values()))
    for found in pool.run(first_gradients, 2, case.on(TWO_RANKS[layout])):
        assert found.keys() == expected.keys()
        error = math.hypot(*(float((found[name] - gradient).norm()) for name, gradient in expected.items()))
        assert error < 1e-6 * size


@pytest.mark.parametrize("layout", PROVED)
def test_activation_checkpointing_changes_nothing(pool: WorkerPool, layout: str) -> None:
    engine, model = TWO_RANKS[layout].model_copy(update={"activation_checkpointing": True}), suited(layout, "llama")
    for result in pool.run(seam.run, 2, reference_case(model, probe=False).on(engine)):
        assert_same_course(result, undisturbed(model))


@pytest.mark.parametrize("stems", [seam.LORA_STEMS, seam.LORA_STEMS[1:]], ids=["both-stages", "last-stage-only"])
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_training_only_low_rank_updates_equals_one_process(
    pool: WorkerPool, layout: str, stems: tuple[str, ...]
) -> None:
    case = reference_case(suited(layout, "llama-tied"), freeze=True, lora_stems=stems)
    expected = seam.run(case)
    moved = [name for name, gradient in expected.gradients.items() if gradient.abs().max() > 0]
    assert sorted(moved) == sorted(f"{stem}.lora_{factor}.weight" for stem in stems for factor in "AB")
    found = pool.run(seam.run, 2, case.on(TWO_RANKS[layout]))
    for result in found:
        assert_same_course(result, expected)
    assert_same_probe(found, expected)


@pytest.mark.parametrize("layout", ["pp2", "pp2-vp2", "tp2", "zero1", "zero3"])
def test_sgd_with_momentum_equals_one_process(pool: WorkerPool, layout: str) -> None:
    optim = OptimConfig(kind="sgd", lr=0.05, momentum=0.9, weight_decay=0.01)
    case = reference_case(suited(layout, "llama"), optim=optim, probe=False)
    expected = seam.run(case)
    assert {key for _, state in expected.edits.values() for key in state} == {"momentum_buffer"}
    for result in pool.run(seam.run, 2, case.on(TWO_RANKS[layout])):
        assert_same_course(result, expected)


@pytest.mark.parametrize("layout", [name for name in TWO_RANKS if name != "ddp2"])
def test_a_checkpoint_of_any_layout_is_that_of_one_process_and_goes_on_there(
    pool: WorkerPool, layout: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = suited(layout, "llama-tied")
    whole = CheckpointReader(reference_checkpoint(model, tmp_path_factory.getbasetemp() / model))
    pool.run(seam.run, 2, reference_case(model, probe=False).on(TWO_RANKS[layout]), str(tmp_path))
    written = CheckpointReader(tmp_path / "step-000002")
    assert sorted(written.names()) == sorted(whole.names())
    for name in whole.names():
        assert sorted(written.keys(name)) == sorted(whole.keys(name))
        for key in whole.keys(name):
            torch.testing.assert_close(written.read(name, key), whole.read(name, key), rtol=TOLERANCE, atol=TOLERANCE)
    continued = seam.run(reference_case(model, probe=False), None, str(written.directory))
    assert_same_course(continued, undisturbed(model))


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_a_checkpoint_of_one_process_goes_on_in_any_layout(
    pool: WorkerPool, layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = suited(layout, "llama-tied")
    directory = reference_checkpoint(model, tmp_path_factory.getbasetemp() / model)
    for result in pool.run(seam.run, 2, reference_case(model, probe=False).on(TWO_RANKS[layout]), None, str(directory)):
        assert_same_course(result, undisturbed(model))


def skipped_steps(case: SeamCase) -> tuple[list[bool], float, float]:
    """A step without weight, one with an infinite loss, one that is fine; and how far the weights moved."""
    engine = seam.start(case)
    before = dict(engine.export_state())
    batch = seam.global_batch(case.model, 0)[:2]
    skipped = []
    for factor in (0.0, math.inf, 1.0):
        if factor == 1.0:
            after = dict(engine.export_state())
            still = max(float((after[name] - before[name]).abs().max()) for name in before)
        rows = [
            type(row)(row.tokens, row.labels, (row.weights * factor).nan_to_num(0.0, posinf=math.inf), row.positions)
            for row in batch
        ]
        skipped.append(engine.train_step(StepBatch(0, rows), seam.WeightedNextToken(), 1.0).skipped)
    after = dict(engine.export_state())
    engine.close()
    return skipped, still, max(float((after[name] - before[name]).abs().max()) for name in before)


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_a_step_without_weight_or_with_an_infinite_norm_changes_nothing(pool: WorkerPool, layout: str) -> None:
    case = reference_case(suited(layout, "llama")).on(TWO_RANKS[layout])
    for skipped, still, moved in pool.run(skipped_steps, 2, case):
        assert skipped == [True, True, False]
        assert still == 0.0
        assert moved > 1e-3


@pytest.mark.parametrize(
    "layout", ["pp2", "pp2-vp2", "tp2", "dp2-distopt", "zero2", "zero3", "zero2-offload", "zero3-offload"]
)
def test_bf16_starts_from_exact_masters_and_stays_near_one_process(pool: WorkerPool, layout: str) -> None:
    model = MODELS[suited(layout, "hyperclovax-tied")]
    case = SeamCase(TorchEngineConfig(clip_grad_norm=CLIP, precision="bf16"), model, lora=False)
    expected = seam.run(case)
    for result in pool.run(seam.run, 2, case.on(TWO_RANKS[layout])):
        assert result.losses == pytest.approx(expected.losses, abs=0.02)
        for name, weight in expected.weights.items():
            torch.testing.assert_close(result.weights[name], weight, rtol=0.0, atol=0.02)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    for engine, extra in ((MegatronEngineConfig(), "megatron"), (DeepSpeedEngineConfig(), "deepspeed")):
        with pytest.raises(MissingExtra, match=rf"hcx-llm\[{extra}\]"):
            seam.start(reference_case("llama").on(engine))


def exported_at_once(case: SeamCase) -> dict[str, torch.Tensor]:
    engine = seam.start(case)
    weights = dict(engine.export_state())
    engine.close()
    return weights


@pytest.mark.parametrize("layout", ["pp2", "dp2-distopt", "zero2", "zero3"])
def test_bf16_masters_keep_the_bits_that_the_working_weights_lose(pool: WorkerPool, layout: str) -> None:
    case = SeamCase(TorchEngineConfig(precision="bf16"), MODELS["llama"], lora=False).on(TWO_RANKS[layout])
    start = seam.SeamWeights(MODELS["llama"], 3)
    for weights in pool.run(exported_at_once, 2, case):
        for name, weight in weights.items():
            assert torch.equal(weight, start.tensor(name, tuple(weight.shape))), name


CLIP_GROUPS = OptimConfig(
    lr=1e-2, eps=1e-3, rules=(GroupRule(pattern="*mlp*", clip_group="mlp"), GroupRule(pattern="*norm*", clip_group="n"))
)


@pytest.mark.parametrize("layout", ["pp2", "pp2-vp2", "tp2", "dp2-distopt", "zero0"])
def test_clip_groups_are_clipped_by_their_own_norms(pool: WorkerPool, layout: str) -> None:
    case = reference_case(suited(layout, "llama"), optim=CLIP_GROUPS, probe=False)
    expected = seam.run(case)
    for result in pool.run(seam.run, 2, case.on(TWO_RANKS[layout])):
        assert_same_course(result, expected)


def refusal(case: SeamCase) -> str:
    try:
        seam.start(case)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_the_distributed_optimizer_refuses_sgd(pool: WorkerPool) -> None:
    case = reference_case("llama", optim=OptimConfig(kind="sgd"))
    for message in pool.run(refusal, 2, case.on(TWO_RANKS["dp2-distopt"])):
        assert "optim.kind = adamw" in message


def test_zero_refuses_several_clip_groups(pool: WorkerPool) -> None:
    for message in pool.run(refusal, 2, reference_case("llama", optim=CLIP_GROUPS).on(TWO_RANKS["zero1"])):
        assert "clip_group" in message
        assert "zero_stage = 0" in message


@pytest.mark.parametrize("layout", ["tp2", "zero2"])
def test_a_rule_that_splits_a_fused_matrix_is_refused_by_name(pool: WorkerPool, layout: str) -> None:
    optim = OptimConfig(rules=(GroupRule(pattern="*k_proj*", lr_mult=0.1),))
    for message in pool.run(refusal, 2, reference_case("llama", optim=optim, lora=False).on(TWO_RANKS[layout])):
        assert "q_proj" in message
        assert "k_proj" in message


def test_sequence_parallel_refuses_rows_that_do_not_divide(pool: WorkerPool) -> None:
    for message in pool.run(odd_rows, 2, reference_case("llama").on(TWO_RANKS["tp2-sp"])):
        assert "15 tokens" in message


def odd_rows(case: SeamCase) -> str:
    engine = seam.start(case)
    try:
        engine.train_step(StepBatch(0, seam.global_batch(case.model, 0, seq=15)), seam.WeightedNextToken(), 1.0)
    except ConfigError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("engine", [MegatronEngineConfig(), DeepSpeedEngineConfig(zero_stage=3)])
def test_a_single_process_is_a_legal_layout(
    pool: WorkerPool, engine: MegatronEngineConfig | DeepSpeedEngineConfig
) -> None:
    (result,) = pool.run(seam.run, 1, reference_case("hyperclovax").on(engine))
    assert_same_course(result, undisturbed("hyperclovax"))


@pytest.mark.parametrize(
    "engine",
    [
        MegatronEngineConfig(tensor_parallel=2, pipeline_parallel=2),
        MegatronEngineConfig(tensor_parallel=2, sequence_parallel=True, distributed_optimizer=True),
        MegatronEngineConfig(pipeline_parallel=2, distributed_optimizer=True),
        MegatronEngineConfig(
            tensor_parallel=2, pipeline_parallel=2, virtual_pipeline_parallel=2, sequence_parallel=True
        ),
        MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2, distributed_optimizer=True),
    ],
    ids=["tp2-pp2", "tp2-sp-dp2-distopt", "pp2-dp2-distopt", "tp2-sp-pp2-vp2", "pp2-vp2-dp2-distopt"],
)
def test_four_ranks_equal_one_process(pool: WorkerPool, engine: MegatronEngineConfig, tmp_path: Path) -> None:
    model = "hyperclovax-tied" if engine.virtual_pipeline_parallel == 1 else "hyperclovax-tied-deep"
    found = pool.run(seam.run, 4, reference_case(model).on(engine), str(tmp_path))
    for result in found:
        assert_same_course(result, undisturbed(model))
    assert_same_probe(found, reference(model))
    continued = seam.run(reference_case(model, probe=False), None, str(tmp_path / "step-000002"))
    assert_same_course(continued, undisturbed(model))


def odd_probes(case: SeamCase, count: int) -> tuple[float, dict[str, torch.Tensor], list[torch.Tensor], str]:
    """Mean loss, gradients and scores of `count` micro-batches; and what a training step of them says."""
    engine = seam.start(case)
    rows = seam.global_batch(case.model, 0)[:count]
    gradients: dict[str, torch.Tensor] = {}
    loss = engine.gradients(
        StepBatch(0, rows), seam.WeightedNextToken(), lambda name, grad: gradients.update({name: grad.clone()})
    )
    scores = engine.score(rows, seam.scored)
    try:
        engine.train_step(StepBatch(0, rows), seam.WeightedNextToken(), 1.0)
        said = "accepted"
    except ConfigError as error:
        said = str(error)
    engine.close()
    return loss, gradients, scores, said


@pytest.mark.parametrize("count", [1, 3])
def test_interleaved_probes_and_scores_take_any_number_of_micro_batches_and_steps_whole_groups(
    pool: WorkerPool, count: int
) -> None:
    case = reference_case("llama-deep")
    loss, gradients, scores, _ = odd_probes(case, count)
    for found in pool.run(odd_probes, 2, case.on(TWO_RANKS["pp2-vp2"]), count):
        assert found[0] == pytest.approx(loss, rel=TOLERANCE)
        assert_same_tensors(found[1], gradients)
        assert len(found[2]) == count
        for score, other in zip(found[2], scores, strict=True):
            torch.testing.assert_close(score, other, rtol=TOLERANCE, atol=TOLERANCE)
        assert f"groups of pipeline_parallel = 2, and a step has {count} on each replica" in found[3]
        assert "engine.virtual_pipeline_parallel=1" in found[3].splitlines()[-1]
