"""One recipe, one command: training with regularisation ends in planes that serve, without a second quantization."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hcx.artifacts import find_resource, verify
from hcx.compress.regularise import PlaneStore
from hcx.errors import CheckpointError, ConfigError
from hcx.model.load import load_model
from hcx.obs import read_jsonl
from hcx.recipe import check_recipe, load_train_recipe
from hcx.recipe.run import run_training
from hcx.testing.commands import hcx, small_run
from hcx.testing.shards import tiny_shards
from hcx.train import CheckpointReader

DEMO = str(find_resource("launch/train/demo.yaml"))
SECTION = (
    "regularise={period: 3, warmup_steps: 0, default: {kind: bcq, bits: 2, group_size: 16}, exceptions: "
    "[{pattern: '*.o_proj', rule: {kind: prune, fraction: 0.5}}, {pattern: '*.down_proj', rule: {kind: uniform, "
    "bits: 4, group_size: 16}}]}"
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_shards(tmp_path_factory.mktemp("data") / "shards").directory)


def overrides(shards: Path, out: Path, *more: str) -> list[str]:
    return small_run(shards, out, "train.steps=8", *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    out = tmp_path_factory.mktemp("regularised") / "run"
    assert hcx("train", DEMO, *overrides(shards, out, SECTION)) == 0
    return out


def test_the_model_holds_the_planes_of_the_last_event_as_they_are(finished: Path) -> None:
    model = verify(finished / "model")
    assert model.kind == "model"
    planes = load_file(finished / "planes" / "bcq.safetensors")
    stored = load_file(finished / "model" / "bcq.safetensors")
    assert {name.rsplit(".", 2)[-2] for name in planes} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    }
    for name, tensor in planes.items():
        assert torch.equal(stored[name], tensor), name
    # The checkpoint's masters are the same model: what was trained is what is stored.
    reader = CheckpointReader(finished / "checkpoints" / "step-000008")
    loaded = load_model(finished / "model")
    linears = loaded.decoder.linears()
    assert len(linears) == 14
    for stem, packed in PlaneStore(finished / "planes").read(8).items():
        assert torch.equal(packed.dequantize(), reader.read(f"{stem}.weight", "master")), stem
    pruned = stored["model.layers.0.self_attn.o_proj.weight"]
    assert int((pruned == 0).sum()) == pruned.numel() // 2


def test_the_packed_model_predicts_as_the_last_validation_measured(
    finished: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hcx.recipe.quality import measure_quality

    rows = [row for row in read_jsonl(finished / "metrics.jsonl") if "validation/bits_per_byte/ko" in row]
    measured = measure_quality([("packed", finished / "model")], shards, seq_len=32, max_documents=2)
    for language, value in measured.models[0].bits_per_byte.items():
        # Training validates in bf16; without the last event the two differ by more than this.
        assert value.value == pytest.approx(rows[-1][f"validation/bits_per_byte/{language}"], rel=0.01)
    assert hcx("generate", finished / "model", "--prompt", "문서", "--max-tokens", "4", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 4


def test_events_are_rows_of_the_metrics(finished: Path) -> None:
    rows = [row for row in read_jsonl(finished / "metrics.jsonl") if "regularise/events" in row]
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert [row["regularise/steps_between"] for row in rows] == [3, 3, 2]
    for row in rows:
        assert row["regularise/strength"] == pytest.approx(
            row["regularise/event_size"] / row["regularise/steps_between"]
        )
        assert row["regularise/event_s"] > 0


def test_a_run_that_stops_between_events_goes_on_bit_for_bit(tmp_path: Path, finished: Path, shards: Path) -> None:
    out = tmp_path / "stopped"
    recipe = load_train_recipe(DEMO, overrides(shards, out, SECTION))
    asked = iter([None] * 4 + ["a test"])
    first = run_training(recipe, stop=lambda: next(asked))
    assert (first.step, first.finished) == (4, False)
    assert not (out / "planes").exists()
    assert run_training(recipe).finished
    for name in ("planes/bcq.safetensors", "model/bcq.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    # A finished run asked for again finds its planes and has no event more.
    assert run_training(recipe).finished
    rows = [row["step"] for row in read_jsonl(out / "metrics.jsonl") if "regularise/events" in row]
    assert rows == [3, 6, 8]
    with pytest.raises(CheckpointError, match=r"regularise.period was 3 when the checkpoint was written, now 4"):
        run_training(load_train_recipe(DEMO, overrides(shards, out, SECTION, "regularise.period=4")))


def test_planes_of_another_step_are_refused(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(CheckpointError, match="planes of step 8, but the run is at step 9"):
        PlaneStore(finished / "planes").read(9)
    with pytest.raises(CheckpointError, match="are not there"):
        PlaneStore(tmp_path / "none").read(8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["regularise={period: 2000}"], "regularise.period = 2000: longer than the run, train.steps = 1200"),
        (["regularise={period: lr_scaled, base_period: 1300}"], "regularise.base_period = 1300: longer than the run"),
        (["regularise={warmup_steps: 1200}"], "no event would come before the last"),
        (["regularise={output: {kind: bcq}}"], "set regularise.embedding instead"),
        (["regularise={default: {kind: prune, ramp_steps: 1200}}"], "would end after train.steps = 1200"),
        (["regularise={exceptions: [{pattern: '*.qproj', keep: true}]}"], "did you mean '*.q_proj'?"),
        (["regularise={}", "adapter={kind: lora}", "init_from=somewhere"], "regularise beside adapter"),
        (
            [
                "regularise={method: straight_through}",
                "engine={kind: megatron, tensor_parallel: 2}",
                "optim.kind=adamw",
            ],
            "groups of 128 inputs do not divide the 352 inputs",
        ),
    ],
)
def test_what_cannot_run_is_told_before_the_first_step(values: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_recipe(load_train_recipe(DEMO, values))
    assert message in str(error.value)


def test_the_command_answers_with_exit_2(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hcx("train", DEMO, *overrides(shards, tmp_path / "run", SECTION, "regularise.period=9")) == 2
    answer = capsys.readouterr().err
    assert "regularise.period = 9" in answer
    assert "Traceback" not in answer
