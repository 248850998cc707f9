"""A recipe on conversations with an adapter, from the command line: what it writes computes alike everywhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hcx.artifacts import verify
from hcx.compress import CompressPlan, compress_model
from hcx.compress.plan import ModulePlan, PlanRule
from hcx.data.token_budget import TokenBudgetLoader
from hcx.dist import Topology
from hcx.errors import ConfigError
from hcx.model.decoder import Decoder
from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.model.parts.base import PlainParts
from hcx.model.transforms import TransformContext
from hcx.obs import read_jsonl
from hcx.recipe import check_recipe, load_train_recipe
from hcx.recipe.adapt import PackedBase
from hcx.recipe.data import open_data
from hcx.testing.commands import hcx
from hcx.testing.tiny import TINY_TEXT, tiny_model_directory
from hcx.tokenizer import Tokenizer, train_tokenizer

TOLERANCE = 1e-5
"""fp32 on one CPU: the same products in another order. Of logits, relative to the largest."""
PREAMBLE = "다음은 사용자와 모델의 대화입니다."


def write_recipe(directory: Path, base: Path, name: str, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "name": name,
        "out": str(directory / name),
        "init_from": str(base),
        "data": {
            "kind": "chat",
            "sources": [{"path": str(directory / "chat.jsonl")}],
            "seq_len": 160,
            "validation_fraction": 0.1,
            "preamble": PREAMBLE,
        },
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "train": {"steps": 6, "global_batch": 512, "micro_batch": 256, "checkpoint_every": 3},
        "optim": {"lr": 0.02, "eps": 0.001, "schedule": {"warmup_steps": 1}},
        **changes,
    }
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapt")
    tiny_model_directory(path / "base")
    # The same weights under another tokenizer.
    tiny_model_directory(path / "other", with_tokenizer=False)
    train_tokenizer(TINY_TEXT[2:4], 384).save(path / "other")
    rows = [
        {"prompt": TINY_TEXT[number % 5][: 8 + number], "response": TINY_TEXT[(number + 1) % 5][: 3 + 2 * number]}
        for number in range(40)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (path / "chat.jsonl").write_text(text, encoding="utf-8")
    assert hcx("train", write_recipe(path, path / "base", "run")) == 0
    return path


def logits(model: Path, adapter: Path | None = None) -> Tensor:
    loaded = load_model(model, adapter=adapter)
    with torch.no_grad():
        return loaded.decoder.output(loaded.decoder(torch.arange(80, 120)[None], ForwardMeta())).logits()


def assert_alike(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def test_the_adapter_the_merged_model_and_peft_compute_alike(directory: Path) -> None:
    found = logits(directory / "base", directory / "run" / "adapter")
    assert float((found - logits(directory / "base")).abs().max()) > 0.1
    assert_alike(logits(directory / "run" / "model"), found)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(directory / "base"), local_files_only=True)
    model = peft.PeftModel.from_pretrained(theirs, str(directory / "run" / "adapter"))
    with torch.no_grad():
        expected = model(input_ids=torch.arange(80, 120)[None]).logits
    assert_alike(found, expected)


def test_the_base_stays_as_it_was_and_the_ledger_names_it(directory: Path) -> None:
    base = load_file(directory / "base" / "model.safetensors")
    tuned = load_file(directory / "run" / "model" / "model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(tensor, tuned[name]) == (not name.endswith("_proj.weight")), name
    for kind in ("adapter", "model"):
        manifest = verify(directory / "run" / kind)
        assert manifest.kind == kind
        assert {item.role for item in manifest.inputs} == {"checkpoint", "text", "model"}
        assert manifest.counts["tokenizer_digest"] == Tokenizer.load(directory / "base").digest


def test_held_out_conversations_are_scored_in_nats_per_trained_token_and_improve(directory: Path) -> None:
    rows = list(read_jsonl(directory / "run" / "metrics.jsonl"))
    losses = [row["validation/loss/chat"] for row in rows if "validation/loss/chat" in row]
    assert losses[-1] < losses[0] - 0.3
    trained = [row for row in rows if "train/loss" in row]
    for name in ("data/padding", "data/epoch", "train/likely"):
        assert all(name in row for row in trained)


def test_the_command_prints_the_loss_by_source_and_what_it_wrote(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(directory, directory / "base", "printed")
    assert hcx("train", recipe, "train.steps=2", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["loss"]) == {"chat"}
    assert hcx("train", recipe, "train.steps=2") == 0
    assert f"adapter: {directory / 'printed' / 'adapter'}\nmodel: {directory / 'printed' / 'model'}" in (
        capsys.readouterr().out
    )
    assert hcx("train", recipe, "--dry-run") == 0
    # Six steps of 512 tokens: the batch counts tokens, so no row length multiplies it.
    assert " 3,072 tokens" in capsys.readouterr().out


def test_checkpoints_convert_to_the_adapter_and_the_model_that_the_run_wrote(directory: Path, tmp_path: Path) -> None:
    checkpoint = directory / "run" / "checkpoints" / "step-000006"
    assert hcx("convert", checkpoint, tmp_path / "peft", "--to", "peft") == 0
    assert hcx("convert", checkpoint, tmp_path / "hf", "--to", "hf") == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (directory / "run" / "adapter" / name).read_bytes()
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (directory / "run" / "model" / name).read_bytes()


def test_an_adapter_merges_into_its_model_by_convert(directory: Path, tmp_path: Path) -> None:
    arguments = ("convert", directory / "base", tmp_path / "hf", "--to", "hf", "--adapter", directory / "run/adapter")
    assert hcx(*arguments) == 0
    for name in ("model.safetensors", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (directory / "run" / "model" / name).read_bytes()


def test_generate_takes_an_adapter(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for arguments in (
        (directory / "run" / "model",),
        (directory / "base", "--adapter", directory / "run" / "adapter"),
        (directory / "base",),
    ):
        assert hcx("generate", *arguments, "--prompt", "대한민국", "--max-tokens", "24", "--json") == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1] != texts[2]


def test_eval_takes_an_adapter_and_says_so(directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    scores = []
    for name, arguments in {
        "merged": (directory / "run" / "model",),
        "beside": (directory / "base", "--adapter", directory / "run" / "adapter"),
        "base": (directory / "base",),
    }.items():
        task = ("--tasks", "hcx_bpb_ko", "--limit", "1")
        assert hcx("eval", *arguments, *task, "--out", tmp_path / name) == 0
        results = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
        scores.append(results["tasks"]["hcx_bpb_ko"]["metrics"]["bits_per_byte"]["value"])
        assert (results["adapter"] is not None) == (name == "beside")
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert scores[0] != pytest.approx(scores[2], rel=1e-3)
    assert [item.role for item in verify(tmp_path / "beside").inputs] == ["model", "adapter"]


def test_every_token_is_trained_where_the_recipe_says_next_token(directory: Path) -> None:
    tuned, every = (
        open_data(load_train_recipe(directory / "run.yaml", overrides)).loader
        for overrides in ((), ("objective={kind: next_token}",))
    )
    assert isinstance(tuned, TokenBudgetLoader)
    assert isinstance(every, TokenBudgetLoader)
    assert every.samples.num_trained == len(every.samples.ids) - len(every.samples)
    assert 0 < tuned.samples.num_trained < every.samples.num_trained


def test_conversations_are_counted_in_the_models_manifest(directory: Path) -> None:
    counts = verify(directory / "run" / "model").counts["conversations"]
    assert counts["read"] == counts["kept"] + counts["too long"] + counts["no answer"]
    assert counts["too long"] > 0


def test_what_was_trained_with_a_preamble_is_asked_with_it(directory: Path) -> None:
    for path in (directory / "run" / "model", directory / "run" / "adapter"):
        tokenizer = Tokenizer.load(path)
        ids = tokenizer.render_chat([{"role": "user", "content": "수도는?"}])
        assert tokenizer.decode(ids).startswith(PREAMBLE + "\n\n")
    loaded = load_model(directory / "base", adapter=directory / "run" / "adapter")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer.render_chat([])).startswith(PREAMBLE)


def test_an_adapter_of_another_tokenizer_is_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hcx("generate", directory / "other", "--adapter", directory / "run" / "adapter", "--prompt", "a") == 2
    assert "another tokenizer.json" in capsys.readouterr().err


def test_an_adapter_on_another_model_than_its_own_is_told(
    directory: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert hcx("convert", directory / "base", tmp_path / "one", "--to", "hcx") == 0
    assert hcx("train", write_recipe(directory, tmp_path / "one", "on-one")) == 0
    compress_model(tmp_path / "one", tmp_path / "coded", CompressPlan.model_validate({"default": {"bits": 4}}))
    adapter = directory / "on-one" / "adapter"
    # The command line's logger does not pass its records on.
    logger = logging.getLogger("hcx.model.load")
    logger.addHandler(caplog.handler)
    for model, told in ((tmp_path / "one", False), (tmp_path / "coded", True)):
        caplog.clear()
        load_model(model, adapter=adapter)
        assert ("which is another model than" in caplog.text) == told
    logger.removeHandler(caplog.handler)


def test_a_run_starts_from_an_adapter_and_refuses_another_shape(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {"kind": "lora", "rank": 4, "alpha": 8, "init_from": str(directory / "run" / "adapter")}
    assert hcx("train", write_recipe(directory, directory / "base", "more", adapter=adapter)) == 0
    first = next(row for row in read_jsonl(directory / "more" / "metrics.jsonl") if "validation/loss/chat" in row)
    last = [row for row in read_jsonl(directory / "run" / "metrics.jsonl") if "validation/loss/chat" in row][-1]
    assert first["validation/loss/chat"] == pytest.approx(last["validation/loss/chat"], rel=TOLERANCE)
    capsys.readouterr()
    changed = {**adapter, "rank": 2}
    assert hcx("train", write_recipe(directory, directory / "base", "other-rank", adapter=changed)) == 2
    assert "has rank 4 and alpha 8" in capsys.readouterr().err
    changed = {**adapter, "targets": ["q_proj"]}
    assert hcx("train", write_recipe(directory, directory / "base", "other-targets", adapter=changed)) == 2
    assert "adapts other linears than adapter.targets say" in capsys.readouterr().err


@pytest.fixture(scope="module")
def coded(directory: Path) -> Path:
    """A binary-coded base whose fused q/k/v is partly dense."""
    plan = CompressPlan(default=ModulePlan(bits=3, group_size=32), rules=(PlanRule(pattern="*.v_proj", keep=True),))
    compress_model(directory / "base", directory / "coded", plan)
    return directory / "coded"


def test_an_adapter_trains_on_packed_weights_as_on_their_dense_form(directory: Path, coded: Path) -> None:
    assert hcx("convert", coded, directory / "dense", "--to", "hf") == 0
    for name, base in (("on-packed", coded), ("on-dense", directory / "dense")):
        assert hcx("train", write_recipe(directory, base, name)) == 0
    packed, dense = (
        load_file(directory / f"on-{n}" / "adapter/adapter_model.safetensors") for n in ("packed", "dense")
    )
    assert packed.keys() == dense.keys()
    for name, tensor in dense.items():
        torch.testing.assert_close(packed[name], tensor, rtol=0, atol=TOLERANCE)
    assert not (directory / "on-packed" / "model").exists()
    index = json.loads((directory / "on-packed/checkpoints/step-000006/index.json").read_text())
    assert "model.layers.0.self_attn.v_proj.weight" in index
    assert "model.layers.0.self_attn.q_proj.weight" not in index
    found = logits(coded, directory / "on-packed" / "adapter")
    assert_alike(found, logits(directory / "on-dense" / "model"))


def test_a_checkpoint_over_packed_weights_converts_to_a_dense_merged_model(
    directory: Path, coded: Path, tmp_path: Path
) -> None:
    if not (directory / "on-packed").exists():
        assert hcx("train", write_recipe(directory, coded, "on-packed")) == 0
    assert hcx("convert", directory / "on-packed/checkpoints/step-000006", tmp_path / "hf", "--to", "hf") == 0
    found = logits(coded, directory / "on-packed" / "adapter")
    assert_alike(logits(tmp_path / "hf"), found)


def test_packed_weights_are_not_cut_by_tensor_parallelism(coded: Path) -> None:
    config = load_model(coded).config
    context = TransformContext(config, Topology(0, 2, tp_size=2))
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel = 2: the binary-coded weights"):
        PackedBase(str(coded)).apply(Decoder(config, PlainParts(device="meta")), context)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.micro_batch=64", "a conversation of data.seq_len = 160 tokens does not fit it; nearest: 160"),
        ("train.global_batch=300", "train.global_batch = 300: must be a multiple of train.micro_batch"),
        ("data.seq_len=999", "longer than model.max_seq_len"),
        ("data.validation_fraction=1.5", "must be from 0 to below 1"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.multiple=0", "data.multiple = 0: must be at least 1"),
        ("data.window=0", "data.window = 0: must be at least 1"),
        ("adapter.targets=[q_prj]", "did you mean 'q_proj'"),
        ("adapter.rank=0", "rank = 0; must be at least 1"),
        ("adapter.dropout=0.1", "dropout"),
        ("objective={kind: dpo}", "objective"),
        ("data.preambel=x", "preamble"),
        (
            "engine={kind: megatron, tensor_parallel: 2, sequence_parallel: true}",
            "use a multiple of it",
        ),
    ],
)
def test_a_recipe_on_conversations_that_cannot_run_says_why(directory: Path, override: str, message: str) -> None:
    overrides = [override] if "sequence" not in override else [override, "data.multiple=3"]
    with pytest.raises(ConfigError) as error:
        check_recipe(load_train_recipe(directory / "run.yaml", overrides))
    assert message in str(error.value)


def test_text_has_no_assistant_and_an_adapter_needs_a_base(tmp_path: Path) -> None:
    from hcx.artifacts import find_resource

    demo = find_resource("launch/train/demo.yaml")
    with pytest.raises(ConfigError, match=r"objective\.kind = sft: text has no assistant's turns"):
        check_recipe(load_train_recipe(demo, ["objective={kind: sft}"]))
    with pytest.raises(ConfigError, match="name it by init_from"):
        check_recipe(load_train_recipe(demo, ["adapter={kind: lora}"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "base", "out", "--to", "peft"), "not a complete checkpoint"),
        (("convert", "base", "out", "--to", "hf", "--adapter", "chat.jsonl"), "no such adapter directory"),
        (
            ("convert", "run/checkpoints/step-000006", "out", "--to", "hf", "--adapter", "run/adapter"),
            "is a checkpoint",
        ),
        (("convert", "base", "out", "--to", "peft", "--adapter", "run/adapter"), "goes with --to hf or hcx"),
        (("train", "run.yaml", "data.sources=[{path: none.jsonl}]", "out=fresh"), "none.jsonl: no such file"),
        (("train", "run.yaml", "data.tokenizer=other", "out=fresh"), "make the data with the model's tokenizer"),
        (("train", "run.yaml", "data.tokenizer=nowhere", "out=fresh"), "nowhere"),
        (("train", "run.yaml", "init_from=nowhere", "out=fresh"), "nowhere: no such model directory"),
    ],
)
def test_mistakes_with_adapters_and_conversations_are_told_and_exit_2(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(directory)
    assert hcx(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
