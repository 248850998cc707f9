"""DropBP inside training: the probe disturbs nothing and measures what it says; a resumed run goes on alike."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hcx.dropbp import DropBP, DropBPConfig
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import TorchEngineConfig
from hcx.errors import CheckpointError
from hcx.model.meta import ForwardMeta
from hcx.model.weights import InitWeights
from hcx.obs import read_jsonl
from hcx.optim import OptimConfig
from hcx.testing.batches import packed_rows
from hcx.testing.runs import FaultyNextToken, small_trainer, weights_of
from hcx.testing.tiny import decoder_tensors, tiny_config, tiny_decoder
from hcx.train import NextToken, Trainer, find_checkpoint, open_checkpoint

CONFIG = tiny_config()
SUBLAYERS = CONFIG.num_sublayers
STEPS = 10


def method(**options: Any) -> DropBP:
    return DropBP(DropBPConfig(**{"rate": 0.5, "probe_at": 0.3, **options}), CONFIG, steps=STEPS, seed=4)


class ProbesInVain(DropBP):
    """Measures sensitivities and keeps equal rates."""

    def _allocated(self, sensitivity: list[float]) -> tuple[float, ...]:
        return (self.config.rate,) * SUBLAYERS


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Masters and optimizer state."""
    return {f"{s.name}/{s.key}": s.tensor.clone() for s in trainer.engine.state_slices()}


@pytest.mark.parametrize("metric", ["norm_diff", "grad_diff"])
def test_the_probe_changes_nothing_of_the_run(tmp_path: Path, metric: str) -> None:
    ends = []
    for name, dropbp in (
        ("probing", ProbesInVain(method(sens_metric=metric).config, CONFIG, steps=STEPS, seed=4)),
        ("plain", method(allocation="uniform")),
    ):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        trainer = small_trainer(tmp_path / name, steps=STEPS, transforms=[dropbp])
        trainer.run()
        losses = [row["train/loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl") if "train/loss" in row]
        random_states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        ends.append((losses, everything(trainer), random_states, bool(dropbp.sensitivity)))
    (losses, state, states, probed), (expected_losses, expected, expected_states, unprobed) = ends
    assert probed
    assert not unprobed
    assert len(losses) == STEPS
    assert losses == expected_losses
    assert states == expected_states
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def independent_sensitivity(metric: str, rows: int) -> list[float]:
    """From the definition, on a plain decoder: no engine, no transform."""
    batch = packed_rows(4, 16, CONFIG.vocab_size, seed=9)
    weight = batch.weights.sum(-1)
    kept = sorted(weight.argsort(descending=True)[:rows].tolist())
    weights = {name: tensor.clone() for name, tensor in decoder_tensors(tiny_decoder(CONFIG, 5)).items()}

    def gradients(dropped: int | None) -> dict[str, Tensor]:
        decoder = tiny_decoder(CONFIG, 5)
        mask = tuple(index == dropped for index in range(SUBLAYERS))
        meta = ForwardMeta(batch.positions[kept], batch.document_ids[kept], dropbp_mask=mask)  # type: ignore[index]
        logits = decoder.output(decoder(batch.tokens[kept], meta)).logits()
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[kept].flatten(), reduction="none")
        ((nats * batch.weights[kept].flatten()).sum() / weight[kept].sum()).backward()
        found = {}
        parameters = dict(decoder.named_parameters())
        for local, blocks in decoder.parameter_map().items():
            gradient = parameters[local].grad
            for block in blocks:
                found[block.name] = torch.zeros_like(weights[block.name]) if gradient is None else block.view(gradient)
        return found

    whole = gradients(None)
    result = []
    for dropped in range(SUBLAYERS):
        partial = gradients(dropped)
        if metric == "grad_diff":
            result.append(sum(float((whole[n].double() - partial[n].double()).norm() ** 2) for n in whole))
        else:
            result.append(
                sum((float(whole[n].double().norm()) - float(partial[n].double().norm())) ** 2 for n in whole)
            )
    return result


@pytest.mark.parametrize("metric", ["norm_diff", "grad_diff"])
@pytest.mark.parametrize("rows", [1, 2])
def test_sensitivities_are_those_of_the_definition(metric: str, rows: int) -> None:
    decoder = tiny_decoder(CONFIG, 5)
    tensors = decoder_tensors(decoder)

    class Weights(InitWeights):
        def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
            return tensors[name]

    dropbp = method(sens_metric=metric, probe_at=0.0, probe_rows=rows)
    engine = build_engine(TorchEngineConfig(), CONFIG, OptimConfig(), [dropbp], Weights(CONFIG, 0), 0)
    batch = packed_rows(4, 16, CONFIG.vocab_size, seed=9)

    def gradients(visit: Any, rows: int = 1) -> float:
        return engine.gradients(StepBatch(0, [batch.heaviest(rows)]), NextToken(), visit)

    dropbp.probe(0, gradients)
    assert dropbp.sensitivity == pytest.approx(independent_sensitivity(metric, rows), rel=1e-3)
    assert min(dropbp.sensitivity) > 0
    # Rates follow: a less sensitive sublayer of the same cost is dropped at least as much.
    for kind in (0, 1):
        order = sorted(range(kind, SUBLAYERS, 2), key=lambda index: dropbp.sensitivity[index])
        assert [dropbp.schedule.rates[i] for i in order] == sorted(
            (dropbp.schedule.rates[i] for i in order), reverse=True
        )
    assert sum(dropbp.rates) == pytest.approx(dropbp.schedule.count)


def test_a_resumed_run_has_the_masks_and_the_losses_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def losses(path: Path) -> dict[int, tuple[float, float]]:
        rows = [row for row in read_jsonl(path / "metrics.jsonl") if "train/loss" in row]
        return {row["step"]: (row["train/loss"], row["dropbp/rate"]) for row in rows}

    whole = method(mask_rule="bernoulli")
    trainer = small_trainer(tmp_path / "whole", steps=STEPS, transforms=[whole])
    trainer.run()
    first = method(mask_rule="bernoulli")
    calls = iter(range(100))
    stopped = small_trainer(
        tmp_path / "two", steps=STEPS, transforms=[first], stop=lambda: "time" if next(calls) == 5 else None
    )
    assert stopped.run().step == 5
    second = method(mask_rule="bernoulli")
    before = second.rates
    resumed = small_trainer(tmp_path / "two", steps=STEPS, transforms=[second])
    reader = find_checkpoint(tmp_path / "two" / "checkpoints")
    assert reader is not None
    resumed.resume(reader)
    assert second.rates == whole.rates != before
    assert second.sensitivity == whole.sensitivity
    masks = [(s, m) for s in range(5, STEPS) for m in range(2)]
    assert [second.schedule.mask(s, m) for s, m in masks] == [whole.schedule.mask(s, m) for s, m in masks]
    assert len({whole.schedule.mask(s, m) for s, m in masks}) > 3
    resumed.run()
    assert losses(tmp_path / "two") == losses(tmp_path / "whole")
    assert all(torch.equal(a, weights_of(trainer)[name]) for name, a in weights_of(resumed).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.25}, r"dropbp.rate was 0.5 when the checkpoint was written, now 0.25.*set dropbp.rate=0.5"),
        ({"mask_rule": "reference"}, "dropbp.mask_rule was exact"),
        ({"stages": 2}, r"dropbp.stages was 1 .* set dropbp.stages=1"),
    ],
)
def test_a_run_that_goes_on_with_other_masks_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        method(**changes).load_state_dict(method().state_dict())


def test_a_checkpoint_without_dropbp_is_where_it_begins(tmp_path: Path) -> None:
    small_trainer(tmp_path, steps=2).run()
    dropbp = method()
    trainer = small_trainer(tmp_path, steps=4, transforms=[dropbp])
    trainer.resume(open_checkpoint(tmp_path / "checkpoints" / "step-000002"))
    assert trainer.run().step == 4


def test_metrics_tell_the_rate_what_was_saved_and_once_the_sensitivities(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, steps=STEPS, transforms=[method()])
    trainer.run()
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert len(rows) == STEPS
    assert {row["dropbp/rate"] for row in rows} == {0.5}
    assert all(0.1 < row["dropbp/flops_saved"] < 0.6 for row in rows)
    assert all(0.2 < row["dropbp/stored_activations"] < 0.8 for row in rows)
    told = [row["step"] for row in rows if "dropbp/sensitivity/0" in row]
    assert told == [4]  # the probe ran before the fourth step
    probed = rows[3]
    assert sum(probed[f"dropbp/rate/{index}"] for index in range(SUBLAYERS)) == pytest.approx(2)


def test_a_probe_on_gradients_that_are_not_numbers_keeps_equal_rates_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hcx"), "propagate", True)
    dropbp = method()
    # Steps have four samples; the probe before the fourth step reads one of 12 and 13.
    objective = FaultyNextToken({12: float("nan"), 13: float("nan")})
    small_trainer(tmp_path, steps=STEPS, transforms=[dropbp], objective=objective).run()
    assert "say nothing (nan, nan" in caplog.text
    assert "all rates stay 0.5" in caplog.text
    assert "learning rate" in caplog.text
    assert dropbp.rates == (0.5,) * SUBLAYERS


def test_a_rate_that_no_whole_number_of_sublayers_gives_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hcx"), "propagate", True)
    assert method(rate=0.875).schedule.count == 3
    assert "4 sublayers in 1 stages drop whole numbers, so the rate is 0.75" in caplog.text


@pytest.mark.parametrize("missing", ["zero", "skip"])
def test_a_sublayer_without_gradient_in_a_step_decays_its_moments_or_is_left_alone(missing: str) -> None:
    """Adam's state by the two meanings of a missing gradient: moments shrink by their betas, or nothing happens."""
    name = "model.layers.1.mlp.down_proj.weight"

    class SecondStep(DropBP):
        def context(self, step: int, micro_batch: int, meta: ForwardMeta) -> ForwardMeta:
            return replace(meta, dropbp_mask=tuple(step == 1 and index == 3 for index in range(SUBLAYERS)))

    optim = OptimConfig(lr=1e-2, weight_decay=0.5, betas=(0.9, 0.95))
    config = TorchEngineConfig(missing_gradients=missing, clip_grad_norm=0.0)  # type: ignore[arg-type]
    engine = build_engine(
        config, CONFIG, optim, [SecondStep(method().config, CONFIG, steps=2, seed=0)], InitWeights(CONFIG, 0), 0
    )
    states = []
    for step in range(2):
        engine.train_step(StepBatch(step, [packed_rows(2, 16, CONFIG.vocab_size, seed=step)]), NextToken(), 1.0)
        states.append({s.key: s.tensor.clone() for s in engine.state_slices() if s.name == name})
    first, second = states
    assert first["exp_avg"].abs().max() > 0
    if missing == "skip":
        assert all(torch.equal(second[key], first[key]) for key in first)
        return
    torch.testing.assert_close(second["exp_avg"], 0.9 * first["exp_avg"])
    torch.testing.assert_close(second["exp_avg_sq"], 0.95 * first["exp_avg_sq"])
    # The momentum still moves the weight, and decay applies: Adam's update with a gradient of zero, in closed form.
    unbiased = second["exp_avg"] / (1 - 0.9**2), second["exp_avg_sq"] / (1 - 0.95**2)
    expected = first["master"] * (1 - 1e-2 * 0.5) - 1e-2 * unbiased[0] / (unbiased[1].sqrt() + optim.eps)
    torch.testing.assert_close(second["master"], expected)
