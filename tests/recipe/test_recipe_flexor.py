"""FleXOR from the command line: a run ends in a model that serves, from planes or from encrypted words alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hcx.artifacts import find_resource, verify
from hcx.errors import CheckpointError, ConfigError
from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.obs import read_jsonl
from hcx.recipe import check_recipe, load_train_recipe
from hcx.testing.commands import hcx, small_run
from hcx.testing.shards import tiny_shards

DEMO = str(find_resource("launch/train/demo.yaml"))
SECTION = "{n_in: 6, n_out: 16, group_size: 16, exceptions: [{pattern: '*.o_proj', keep: true}]"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_shards(tmp_path_factory.mktemp("data") / "shards").directory)


def overrides(shards: Path, out: Path, *more: str) -> list[str]:
    return small_run(shards, out, "optim.schedule.warmup_steps=2", *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("flexor")
    found = {}
    for name, more in (("planes", "}"), ("words", ", encrypted: true}")):
        found[name] = path / name
        assert hcx("train", DEMO, *overrides(shards, found[name], f"flexor={SECTION}{more}")) == 0
    return found


def logits(model: Path) -> torch.Tensor:
    loaded = load_model(model)
    with torch.no_grad():
        return loaded.decoder.output(loaded.decoder(torch.arange(80, 120)[None], ForwardMeta())).logits()


def test_planes_and_encrypted_words_are_one_model_and_words_are_smaller(runs: dict[str, Path], tmp_path: Path) -> None:
    planes, words = (load_file(runs[name] / "model" / "bcq.safetensors") for name in ("planes", "words"))
    assert torch.equal(logits(runs["planes"] / "model"), logits(runs["words"] / "model"))
    codes = [tensor for name, tensor in words.items() if name.endswith(".codes")]
    assert len(codes) == 12
    assert not any(name.endswith(".planes") for name in words)
    # 6 of 16 bits, one of them canonical: 5/16 of a plane.
    assert sum(code.numel() for code in codes) / sum(
        plane.numel() for name, plane in planes.items() if name.endswith(".planes")
    ) == pytest.approx(5 / 16, rel=0.01)
    assert verify(runs["words"] / "model").kind == "model"
    # The checkpoint's keys expand to the same dense model.
    assert hcx("convert", runs["planes"] / "checkpoints" / "step-000006", tmp_path / "hf", "--to", "hf") == 0
    torch.testing.assert_close(logits(tmp_path / "hf"), logits(runs["planes"] / "model"), rtol=1e-5, atol=1e-5)


def test_the_model_generates_and_its_steepness_is_logged(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert hcx("generate", runs["words"] / "model", "--prompt", "문서", "--max-tokens", "4", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 4
    rows = [row for row in read_jsonl(runs["planes"] / "metrics.jsonl") if "flexor/steepness" in row]
    assert [row["flexor/steepness"] for row in rows] == [5.0, 7.5, 10.0, 10.0, 10.0, 10.0]


def test_a_run_does_not_go_on_with_other_networks(runs: dict[str, Path], shards: Path) -> None:
    from hcx.recipe.run import run_training

    recipe = load_train_recipe(DEMO, overrides(shards, runs["planes"], f"flexor={SECTION}, steepness: [5.0, 20.0]}}"))
    with pytest.raises(CheckpointError, match=r"flexor\.steepness was"):
        run_training(recipe)


def test_a_run_may_start_from_the_nearest_words_of_a_trained_model(
    runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    start = tmp_path / "dense"
    assert hcx("train", DEMO, *overrides(shards, start)) == 0
    section = "flexor={n_in: 8, n_out: 16, planes: 2, group_size: 16, init: project}"
    more = (f"init_from={start / 'model'}", "train.steps=3", section)
    assert hcx("train", DEMO, *overrides(shards, tmp_path / "on", *more)) == 0
    rows = [row for row in read_jsonl(tmp_path / "on" / "metrics.jsonl") if "train/loss" in row]
    scratch = [row for row in read_jsonl(runs["planes"] / "metrics.jsonl") if "train/loss" in row]
    assert rows[0]["train/loss"] < scratch[0]["train/loss"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["flexor={}", "regularise={}"], "flexor beside regularise"),
        (["flexor={exceptions: [{pattern: '*.oproj', keep: true}]}"], "did you mean '*.o_proj'?"),
        (["flexor={exceptions: [{pattern: '*', keep: true}]}"], "every layer stays dense"),
        (
            ["flexor={n_in: 8, n_out: 24}", "engine={kind: megatron, tensor_parallel: 2}", "optim.kind=adamw"],
            "must divide the 128 inputs",
        ),
    ],
)
def test_what_cannot_run_is_told_before_the_first_step(values: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_recipe(load_train_recipe(DEMO, values))
    assert message in str(error.value)
