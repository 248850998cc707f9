"""The training recipe: shipped files load, mistakes are answered, a run ends in a model that loads elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hcx.artifacts import find_resource, resource_names, verify
from hcx.cli.main import main
from hcx.config import resolve_extends
from hcx.errors import ConfigError
from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.obs import read_jsonl
from hcx.recipe import check_recipe, load_train_recipe
from hcx.recipe.quality import measure_quality
from hcx.testing.commands import small_run
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_model_directory

DEMO = "launch/train/demo.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_shards(tmp_path_factory.mktemp("data") / "shards").directory)


@pytest.fixture(scope="module")
def any_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("any") / "model", max_seq_len=512)


@pytest.mark.parametrize("name", resource_names("launch/train"))
def test_every_shipped_recipe_loads_and_passes_its_checks(name: str, any_model: Path) -> None:
    written = resolve_extends(find_resource(name))
    # A recipe that takes the shape of its model is read beside one: nobody's runs/ is needed here.
    overrides = [] if "model" in written else [f"init_from={any_model}"]
    check_recipe(load_train_recipe(find_resource(name), overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_batch=7", "train.global_batch = 7: must be a multiple"),
        ("data.seq_len=4096", "longer than model.max_seq_len"),
        ("train.steps=10", "warmup_steps = 20"),
        ("train.micro_batch=0", "train.micro_batch = 0: must be at least 1"),
        ("data.prefetch=-1", "data.prefetch = -1: must not be negative"),
        ("engine={kind: megatron, tensor_parallel: 3}", "tensor_parallel = 3"),
        ("engine={kind: deepspeed}", "optim.kind = muon"),
    ],
)
def test_a_recipe_that_cannot_run_says_why(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_recipe(load_train_recipe(find_resource(DEMO), [override]))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DEMO, "train.stpes=3"], "train.stpes"),
        ([DEMO, "train.steps=many"], "train.steps"),
        ([DEMO, "optim.kind=lion"], "optim.kind"),
        (["launch/train/none.yaml"], "none.yaml"),
        ([DEMO, "data.shards=nowhere"], "nowhere"),
        ([DEMO, "noequals"], "noequals"),
    ],
)
def test_the_command_answers_mistakes_with_a_message_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    assert ended.value.code == 2
    answer = capsys.readouterr().err
    assert message in answer
    assert "Traceback" not in answer


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", DEMO, *small_run(shards, tmp_path / "run"), "--dry-run"])
    assert ended.value.code == 0
    assert "hidden_size: 32" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_run_ends_with_metrics_a_checkpoint_and_a_model_that_computes_alike(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", DEMO, *small_run(shards, out), "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["finished"]
    rows = list(read_jsonl(out / "metrics.jsonl"))
    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 7))
    for name in ("train/lr", "train/grad_norm", "throughput/tokens_per_s", "throughput/mfu", "data/share/ko"):
        assert name in trained[0]
    assert {row["step"] for row in rows if "validation/bits_per_byte/ko" in row} == {0, 3, 6}
    manifest = verify(out / "model")
    assert [item.role for item in manifest.inputs] == ["checkpoint", "shards"]
    loaded = load_model(out / "model")
    assert loaded.tokenizer is not None
    measured = measure_quality([("full", out / "model")], shards, seq_len=32, max_documents=2)
    for language, value in told["bits_per_byte"].items():
        # Training validates in bf16, the exported model computes in fp32.
        assert measured.models[0].bits_per_byte[language].value == pytest.approx(value, rel=0.01)
    with torch.no_grad():
        tokens = torch.tensor([loaded.tokenizer.encode("파일을 저장하십시오.")])
        assert torch.isfinite(loaded.decoder.output(loaded.decoder(tokens, ForwardMeta())).logits()).all()


def test_a_recipe_can_ask_for_filling_in_the_middle_and_for_other_factors(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for number, more in enumerate(([], ["data.fim={rate: 1.0, rates: {en: 0.5}}"], ["data.upsample={ko: 2}"])):
        out = tmp_path / f"run{number}"
        with pytest.raises(SystemExit) as ended:
            main(["train", DEMO, *small_run(shards, out, *more)])
        assert ended.value.code == 0, capsys.readouterr().err
        losses.append([row["train/loss"] for row in read_jsonl(out / "metrics.jsonl") if "train/loss" in row])
    assert losses[0] != losses[1]
    assert losses[0] != losses[2]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["train", DEMO, *small_run(shards, tmp_path / "run", "data.fim={rates: {kor: 0.5}}")])
    assert ended.value.code == 2
    assert "did you mean 'ko'" in capsys.readouterr().err


def test_a_finished_run_is_found_finished_and_never_overwritten(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["train", DEMO, *small_run(shards, out)])
        assert ended.value.code == 0
    steps = [row["step"] for row in read_jsonl(out / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, 7))
    with pytest.raises(SystemExit) as refused:
        main(["train", DEMO, *small_run(shards, out), "--resume", "never"])
    assert refused.value.code == 2
    assert "holds checkpoints" in capsys.readouterr().err


def test_a_run_stopped_by_its_deadline_is_resumable_and_ends_as_if_it_had_not_been(
    tmp_path: Path, shards: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    with pytest.raises(SystemExit) as ended:
        main(["train", DEMO, *small_run(shards, straight)])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as stopped:
        main(["train", DEMO, *small_run(shards, broken, "train.max_minutes=0.000001")])
    assert stopped.value.code == 75
    with pytest.raises(SystemExit) as resumed:
        main(["train", DEMO, *small_run(shards, broken)])
    assert resumed.value.code == 0
    one, two = ((path / "model" / "model.safetensors").read_bytes() for path in (straight, broken))
    assert one == two


def test_threads_that_prepare_batches_change_nothing(tmp_path: Path, shards: Path) -> None:
    models = []
    for threads in (0, 3):
        out = tmp_path / f"{threads}"
        with pytest.raises(SystemExit) as ended:
            main(["train", DEMO, *small_run(shards, out, f"data.prefetch={threads}")])
        assert ended.value.code == 0
        models.append((out / "model" / "model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_a_run_does_not_go_on_with_the_data_in_another_order(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    stop_after = ["train.checkpoint_every=2", "train.steps=4"]
    with pytest.raises(SystemExit):
        main(["train", DEMO, *small_run(shards, out, *stop_after)])
    for change, named in (("seed=5", "seed was"), ("data.shares={ko: 1}", "shares was")):
        with pytest.raises(SystemExit) as refused:
            main(["train", DEMO, *small_run(shards, out, change)])
        assert refused.value.code == 2
        assert named in capsys.readouterr().err


def test_a_checkpoint_converts_to_the_model_it_exported(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        main(["train", DEMO, *small_run(shards, out)])
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(out / "checkpoints" / "step-000006"), str(tmp_path / "hf"), "--to", "hf"])
    assert ended.value.code == 0
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (out / "model" / "model.safetensors").read_bytes()
    assert not (tmp_path / "hf" / "manifest.json").exists()
    with pytest.raises(SystemExit) as refused:
        main(["convert", str(tmp_path), str(tmp_path / "other"), "--to", "hf"])
    assert refused.value.code == 2
