"""Bad steps: skipped, counted, gone back over or the end, the same on every rank, with their samples on record."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from hcx.engine.base import StepStats
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.errors import TrainingError
from hcx.obs import read_jsonl
from hcx.testing.runs import FaultyNextToken, small_trainer, weights_of
from hcx.testing.workers import WorkerPool
from hcx.train import CheckpointReader, ResilienceConfig, latest_checkpoint, read_ledger
from hcx.train.resilience import Action, StepWatch

STEPS = 8
BAD_STEP = 5
"""Counted from 1: the step with sample 17, of four samples per step."""
BAD_SAMPLE = 17
SPIKE = 50.0
"""Factor of the loss at the bad sample: far above ten spreads."""


def events(directory: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(directory / "metrics.jsonl") if row.get("event") == name]


def run(directory: Path, factor: float, steps: int = STEPS, times: int | None = None, **policy: Any) -> Any:
    """A finished run with a bad sample under a policy; its trainer."""
    resilience = ResilienceConfig(**{"spike_window": 3, **policy})
    trainer = small_trainer(
        directory,
        steps=steps,
        objective=FaultyNextToken({BAD_SAMPLE: factor}, times),
        validate=False,
        checkpoint_every=2,
        resilience=resilience,
    )
    assert trainer.run().finished
    return trainer


def equal(one: Any, two: Any) -> bool:
    other = weights_of(two)
    return all(torch.equal(tensor, other[name]) for name, tensor in weights_of(one).items())


@pytest.mark.parametrize(
    ("factor", "policy", "action", "made"),
    [
        (math.nan, {}, "skip", False),
        (math.inf, {"non_finite": "skip"}, "skip", False),
        (SPIKE, {"spike": "skip"}, "skip", False),
        (SPIKE, {"spike": "count"}, "count", True),
    ],
)
def test_a_bad_step_is_skipped_or_counted_with_its_samples(
    tmp_path: Path, factor: float, policy: dict[str, Any], action: str, made: bool
) -> None:
    trainer = run(tmp_path / "bad", factor, **policy)
    (event,) = events(tmp_path / "bad", "bad_step")
    assert (event["step"], event["action"], event["samples"]) == (BAD_STEP, action, [[16, 20]])
    skipped = [row["step"] for row in read_jsonl(tmp_path / "bad" / "metrics.jsonl") if "train/skipped" in row]
    assert skipped == ([] if made else [BAD_STEP])
    assert trainer.engine.scalars()["optimizer_steps"] == (STEPS if made else STEPS - 1)
    if not made:
        # No update means no trace: the weights are those of a run in which the step was never computed.
        assert equal(trainer, left_out(tmp_path / "left-out"))


def left_out(directory: Path, steps: int = STEPS) -> Any:
    """A run on sound data that does not compute the bad step, because its list says so."""
    trainer = small_trainer(directory, steps=steps, validate=False)
    trainer._watch.left_out.add(BAD_STEP - 1)
    trainer.run()
    return trainer


def test_a_run_without_bad_samples_has_no_bad_steps(tmp_path: Path) -> None:
    run(tmp_path, 1.0, spike="abort")
    assert events(tmp_path, "bad_step") == []


@pytest.mark.parametrize(("factor", "policy"), [(math.nan, {"non_finite": "rewind"}), (SPIKE, {"spike": "rewind"})])
def test_a_run_that_goes_back_leaves_the_step_out_and_says_so(
    tmp_path: Path, factor: float, policy: dict[str, Any]
) -> None:
    trainer = run(tmp_path / "bad", factor, **policy)
    (back,) = events(tmp_path / "bad", "rewind")
    assert back["step"] == BAD_STEP
    assert back["to_step"] == 4
    assert back["left_out"] == [BAD_STEP]
    assert equal(trainer, left_out(tmp_path / "left-out"))
    newest = latest_checkpoint(tmp_path / "bad" / "checkpoints")
    assert newest is not None
    assert CheckpointReader(newest).trainer_state["watch"]["left_out"] == [BAD_STEP - 1]
    ledger = read_ledger(newest)
    assert [row["step"] for row in ledger] == list(range(1, STEPS + 1))
    assert ledger[BAD_STEP - 1]["no_update"] == "left out"
    rows = [row["step"] for row in read_jsonl(tmp_path / "bad" / "metrics.jsonl") if "event" not in row]
    assert rows == list(range(1, STEPS + 1))


def test_a_run_stopped_after_going_back_goes_on_alike(tmp_path: Path) -> None:
    policy = ResilienceConfig(non_finite="rewind")
    calls = iter(range(100))

    def part(stop: Any = None) -> Any:
        return small_trainer(
            tmp_path / "parts",
            steps=STEPS,
            objective=FaultyNextToken({BAD_SAMPLE: math.nan}),
            validate=False,
            checkpoint_every=2,
            resilience=policy,
            stop=stop,
        )

    # Steps 1 to 4, the bad one, the left out one, step 6: then the stop.
    first = part(lambda: "a test" if next(calls) == 7 else None)
    assert not first.run().finished
    second = part()
    newest = latest_checkpoint(tmp_path / "parts" / "checkpoints")
    assert newest is not None
    second.resume(CheckpointReader(newest))
    assert second.run().finished
    assert equal(second, left_out(tmp_path / "left-out"))


def test_what_losses_were_usual_is_known_after_a_restart(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "steps": STEPS,
        "objective": FaultyNextToken({BAD_SAMPLE: SPIKE}),
        "validate": False,
        "resilience": ResilienceConfig(spike="skip", spike_window=3),
    }
    calls = iter(range(100))
    small_trainer(tmp_path, stop=lambda: "a test" if next(calls) == BAD_STEP - 1 else None, **options).run()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    second = small_trainer(tmp_path, **options)
    second.resume(CheckpointReader(newest))
    assert second.run().finished
    assert [event["step"] for event in events(tmp_path, "bad_step")] == [BAD_STEP]
    assert equal(second, left_out(tmp_path / "left-out"))


def test_the_first_steps_can_be_gone_back_over_too(tmp_path: Path) -> None:
    trainer = small_trainer(
        tmp_path,
        steps=3,
        objective=FaultyNextToken({1: math.nan}),
        validate=False,
        resilience=ResilienceConfig(non_finite="rewind"),
    )
    assert trainer.run().finished
    assert [event["to_step"] for event in events(tmp_path, "rewind")] == [0]


def test_a_run_goes_back_only_so_often(tmp_path: Path) -> None:
    bad = dict.fromkeys(range(16, 40), math.nan)
    trainer = small_trainer(
        tmp_path,
        steps=12,
        objective=FaultyNextToken(bad),
        validate=False,
        resilience=ResilienceConfig(non_finite="rewind", max_rewinds=2),
    )
    with pytest.raises(TrainingError, match="went back 2 times"):
        trainer.run()


def test_a_bad_step_ends_the_run_with_the_state_before_it_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 5: loss nan.*checkpoint of step 4"):
        run(tmp_path, math.nan, non_finite="abort")
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    # Mended, the run goes on as if nothing had been.
    trainer = small_trainer(tmp_path, steps=STEPS, validate=False)
    trainer.resume(CheckpointReader(newest))
    trainer.run()
    straight = small_trainer(tmp_path / "straight", steps=STEPS, validate=False)
    straight.run()
    assert equal(trainer, straight)


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    trainer = small_trainer(
        tmp_path,
        steps=9,
        objective=FaultyNextToken(dict.fromkeys(range(100), math.nan)),
        validate=False,
        max_skipped_steps=4,
    )
    with pytest.raises(TrainingError, match="4 bad steps in a row"):
        trainer.run()


ENGINES = {
    "dp2": TorchEngineConfig(data_parallel=2),
    "zero1": DeepSpeedEngineConfig(zero_stage=1, data_parallel=2),
    "zero3": DeepSpeedEngineConfig(zero_stage=3, data_parallel=2),
    "pp2": MegatronEngineConfig(pipeline_parallel=2),
}
ATOL = 2e-3
"""Layouts sum in another order, and with Adam's small eps gradients at rounding level become updates of a size; a
forgotten or doubled step would show as 1e-2, the learning rate."""


def _run_on_ranks(
    directory: str, engine: Any, factor: float, policy: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], list[int], int]:
    from hcx.dist import rehearsal

    if engine.kind == "megatron":
        rehearsal.enable()
    trainer = small_trainer(
        directory,
        kind="adamw",
        steps=STEPS,
        objective=FaultyNextToken({BAD_SAMPLE: factor}),
        validate=False,
        engine=engine,
        micro_batch=1,
        checkpoint_every=2,
        resilience=ResilienceConfig(spike_window=3, **policy),
    )
    trainer.run()
    found = weights_of(trainer)
    trainer.engine.close()
    return found, sorted(trainer._watch.left_out), trainer._watch.rewinds


@pytest.mark.parametrize(
    ("layout", "factor", "policy"),
    [
        ("dp2", math.nan, {"non_finite": "rewind"}),
        ("dp2", SPIKE, {"spike": "rewind"}),
        ("zero1", SPIKE, {"spike": "skip"}),
        ("zero1", math.nan, {"non_finite": "rewind"}),
        ("zero3", SPIKE, {"spike": "skip"}),
        ("zero3", math.nan, {"non_finite": "rewind"}),
        ("pp2", SPIKE, {"spike": "skip"}),
    ],
)
def test_two_ranks_decide_as_one_although_one_rank_alone_has_the_bad_sample(
    pool: WorkerPool, tmp_path: Path, layout: str, factor: float, policy: dict[str, Any]
) -> None:
    one, two = pool.run(_run_on_ranks, 2, str(tmp_path / "two"), ENGINES[layout], factor, policy)
    assert one[1:] == two[1:]
    assert one[1] == ([BAD_STEP - 1] if "rewind" in policy.values() else [])
    reference = left_out(tmp_path / "reference")
    for name, tensor in weights_of(reference).items():
        assert torch.equal(one[0][name], two[0][name])
        torch.testing.assert_close(one[0][name], tensor, rtol=0.0, atol=ATOL)
    (event,) = events(tmp_path / "two", "bad_step")
    assert event["samples"] == [[16, 20]]


def stats(loss: float, norm: float = 1.0, skipped: bool = False) -> StepStats:
    return StepStats(loss_sum=loss * 10, weight=10.0, grad_norm=norm, skipped=skipped)


def test_the_limit_is_that_of_the_median_and_its_deviation() -> None:
    watch = StepWatch(ResilienceConfig(spike="skip", spike_window=5, spike_sigmas=10.0), 20)
    for loss in (3.0, 1.0, 2.0, 2.0, 9.0):
        assert watch.limits() == (math.inf, math.inf)
        assert watch.judge(stats(loss), watch.limits()).action is Action.ACCEPT
    # By hand: the median of 1 2 2 3 9 is 2, deviations 1 0 0 1 7 have the median 1.
    assert watch.limits()[0] == pytest.approx(2.0 + 10 * 1.4826)
    # Of equal norms the deviation is 0, and a fiftieth of the median counts instead.
    assert watch.limits()[1] == pytest.approx(1.0 + 10 * 0.02)
    verdict = watch.judge(stats(20.0), watch.limits())
    assert verdict.action is Action.SKIP
    assert "loss 20 above 16.826" in verdict.reason


def test_noise_and_a_falling_curve_make_no_spikes_but_a_jump_does() -> None:
    draw = random.Random(0)
    watch = StepWatch(ResilienceConfig(spike="skip", spike_window=50), 20)
    for step in range(2000):
        loss = 2.0 + 8.0 * math.exp(-step / 200) + draw.gauss(0, 0.05)
        norm = math.exp(draw.gauss(0, 0.25))
        assert watch.judge(stats(loss, norm), watch.limits()).action is Action.ACCEPT
    assert watch.judge(stats(4.0), watch.limits()).action is Action.SKIP
    assert watch.judge(stats(2.0, 30.0), watch.limits()).action is Action.SKIP


def test_judgement_goes_on_after_a_restart_as_before() -> None:
    config = ResilienceConfig(spike_window=4)
    watch, other = StepWatch(config, 20), StepWatch(config, 20)
    for loss in (1.1, 1.0, 1.3, 1.2, 0.7):
        watch.judge(stats(loss, loss), watch.limits())
    watch.leave_out(7)
    other.load_state_dict(watch.state_dict())
    assert other.limits() == watch.limits()
    assert (other.left_out, other.rewinds) == ({7}, 1)
    watch.forget()
    assert watch.limits() == (math.inf, math.inf)
