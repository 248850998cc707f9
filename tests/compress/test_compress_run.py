"""Compressing a model directory: plan, files, divergence, errors that lose nothing."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hcx.artifacts import artifact_input, new_artifact, read_manifest, resource_names, verify
from hcx.cli.main import main
from hcx.compress import CompressPlan, ModulePlan, PlanRule, compress_model, plan_rows
from hcx.compress.divergence import divergence, divergence_by_language
from hcx.config import load_config
from hcx.config.decode import decode
from hcx.errors import ConfigError
from hcx.model.load import iter_tensors, load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.batches import packed_rows
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_model_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("models") / "full", with_tokenizer=False)


def _logits(directory: Path) -> torch.Tensor:
    decoder = load_model(directory).decoder
    with torch.no_grad():
        return decoder.output(decoder(torch.arange(24).view(2, 12), ForwardMeta())).logits()


def test_a_compressed_directory_computes_with_its_dequantized_weights(model: Path, tmp_path: Path) -> None:
    from hcx.model.convert.hf import export_hf

    plan = CompressPlan(default=ModulePlan(bits=3, group_size=24), rules=(PlanRule(pattern="*.v_proj", keep=True),))
    summary = compress_model(model, tmp_path / "bcq", plan)
    dense = tmp_path / "dense"
    dense.mkdir()
    export_hf(dense, load_model(model).config, iter_tensors(tmp_path / "bcq"))
    torch.testing.assert_close(_logits(tmp_path / "bcq"), _logits(dense), rtol=0, atol=1e-5)
    assert len(summary.modules) == 12
    kept = dict(iter_tensors(model))["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(dict(iter_tensors(tmp_path / "bcq"))["model.layers.0.self_attn.v_proj.weight"], kept)


def test_the_manifest_counts_scales_and_names_its_source(model: Path, tmp_path: Path) -> None:
    compress_model(model, tmp_path / "bcq", CompressPlan(default=ModulePlan(bits=4, group_size=32)))
    manifest = verify(tmp_path / "bcq")
    # 4 bits and four fp16 scales per 32 weights: 6 bits. Matrices of 96 and 64 inputs divide evenly.
    assert manifest.counts["bits_per_weight"] == pytest.approx(4 + 4 * 16 / 32)
    assert manifest.inputs[0].role == "model"
    assert manifest.counts["file_bytes"] == sum(p.stat().st_size for p in (tmp_path / "bcq").glob("*.safetensors"))
    assert [path.name for path in (tmp_path / "bcq").glob("*.safetensors")] == ["bcq.safetensors"]
    config = json.loads((tmp_path / "bcq" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bcq"


def test_divergence_from_full_precision_falls_with_every_bit(model: Path, tmp_path: Path) -> None:
    batches = [packed_rows(3, 24, 384, seed=seed) for seed in range(2)]
    full = load_model(model).decoder
    values = []
    for bits in (1, 2, 3, 4):
        out = tmp_path / f"bcq{bits}"
        compress_model(model, out, CompressPlan(default=ModulePlan(bits=bits, group_size=32)))
        values.append(divergence(full, load_model(out).decoder, batches).kl)
    assert all(later < earlier for earlier, later in itertools.pairwise(values))
    same = divergence(full, full, batches)
    assert same.kl == 0
    assert same.top1 == 1
    assert same.tokens == sum(int((batch.weights > 0).sum()) for batch in batches)


def test_weights_that_lay_on_the_grid_before_are_told_apart(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2's 4-bit file through a 4-bit grid of the same groups looks lossless; the report must say why."""
    from hcx.model.convert.hf import export_hf

    grid = ["--bits", "4", "--group-size", "32", "--method", "uniform"]
    with pytest.raises(SystemExit, match="0"):
        main(["compress", str(model), "--out", str(tmp_path / "once"), *grid])
    assert "this very grid" not in capsys.readouterr().out
    assert not json.loads((tmp_path / "once" / "compression.json").read_text())["own_grid"]
    dense = tmp_path / "dense"
    dense.mkdir()
    export_hf(dense, load_model(model).config, iter_tensors(tmp_path / "once"))
    with pytest.raises(SystemExit, match="0"):
        main(["compress", str(dense), "--out", str(tmp_path / "twice"), *grid])
    assert "this very grid" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "twice" / "compression.json").read_text())["own_grid"]
    eight = ["--bits", "8", "--group-size", "32", "--method", "uniform"]
    with pytest.raises(SystemExit, match="0"):
        main(["compress", str(model), "--out", str(tmp_path / "eight"), *eight])
    assert not json.loads((tmp_path / "eight" / "compression.json").read_text())["own_grid"]


def test_an_interrupted_compression_leaves_nothing_that_looks_like_a_model(model: Path, tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(model, tmp_path / "bcq", CompressPlan(), interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".bcq.work"]


def test_rules_hold_in_order_and_take_the_rest_from_the_default() -> None:
    plan = CompressPlan(
        default=ModulePlan(bits=3, group_size=64, scale_dtype="bf16"),
        rules=(
            PlanRule(pattern="model.layers.0.*", keep=True),
            PlanRule(pattern="*.down_proj", bits=5, offset=True),
            PlanRule(pattern="*.down_proj", bits=1),
        ),
    )
    assert plan.module("model.layers.0.mlp.down_proj") is None
    assert plan.module("model.layers.1.mlp.up_proj") == plan.default
    expected = ModulePlan(bits=5, group_size=64, scale_dtype="bf16", offset=True)
    assert plan.module("model.layers.1.mlp.down_proj") == expected
    assert plan.module("model.embed_tokens") is None
    assert plan.module("lm_head") is None


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["*.dwon_proj"], r"rules\.0\.pattern = '\*\.dwon_proj' matches no linear layer.*did you mean '\*\.down_proj'"),
        (["lm_head"], "embedding and output have keys of their own"),
        (["*_proj", "*.up_proj"], r"rules\.1\.pattern = '\*\.up_proj' has no effect"),
    ],
)
def test_a_rule_that_changes_nothing_is_refused(model: Path, tmp_path: Path, rules: list[str], message: str) -> None:
    plan = CompressPlan(rules=tuple(PlanRule(pattern=pattern, bits=2) for pattern in rules))
    with pytest.raises(ConfigError, match=message):
        compress_model(model, tmp_path / "bcq", plan)
    assert not (tmp_path / "bcq").exists()


def test_a_layer_that_no_rule_names_is_an_error_where_the_plan_says_so(model: Path, tmp_path: Path) -> None:
    rules = [PlanRule(pattern=f"*.{name}", bits=3) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")]
    missing = CompressPlan(covers="named", rules=(*rules, PlanRule(pattern="*.down_proj", keep=True)))
    with pytest.raises(ConfigError, match=r"covers: named, and no rule names model\.layers\.0\.mlp\.gate_proj"):
        compress_model(model, tmp_path / "bcq", missing)
    assert list(tmp_path.iterdir()) == []
    rows, _ = plan_rows(model, missing.model_copy(update={"rules": (*missing.rules, PlanRule(pattern="*", bits=2))}))
    assert {row.rule for row in rows} == {"(kept)", "*", *(rule.pattern for rule in rules)}


def test_rules_choose_schemes_by_name_and_may_change_them() -> None:
    schemes = {"fine": ModulePlan(bits=4, group_size=32), "coarse": ModulePlan(bits=2, group_size=64)}
    plan = CompressPlan(
        schemes=schemes,
        rules=(
            PlanRule(pattern="*.down_proj", scheme="fine", offset=True),
            PlanRule(pattern="*.mlp.*", scheme="coarse"),
        ),
    )
    assert plan.module("model.layers.1.mlp.down_proj") == ModulePlan(bits=4, group_size=32, offset=True)
    assert plan.module("model.layers.1.mlp.up_proj") == schemes["coarse"]
    assert plan.module("model.layers.1.self_attn.q_proj") == plan.default
    for wrong, message in (
        ({"rules": [{"pattern": "*", "scheme": "fin"}], "schemes": {"fine": {}}}, "did you mean 'fine'"),
        ({"rules": [], "schemes": {"fine": {}}}, r"schemes\.fine is used by no rule"),
        ({"rules": [{"pattern": "*", "scheme": "fine", "keep": True}], "schemes": {"fine": {}}}, "beside scheme"),
    ):
        with pytest.raises(ConfigError, match=message):
            decode(CompressPlan, wrong, "plan.yaml")


@pytest.mark.parametrize("method", ["alternating", "uniform"])
def test_the_plan_that_is_told_beforehand_is_what_is_stored(method: str, tmp_path: Path) -> None:
    source = tiny_model_directory(tmp_path / "full", with_tokenizer=False)
    plan = CompressPlan(
        default=ModulePlan(bits=3, group_size=20, method=method, rounds=1),
        rules=(PlanRule(pattern="*.o_proj", bits=2, group_size=4096, scale_dtype="fp32"),),
        embedding=ModulePlan(bits=4, group_size=64, method="greedy", offset=True),
    )
    rows, total = plan_rows(source, plan)
    summary = compress_model(source, tmp_path / "bcq", plan)
    stored = load_file(tmp_path / "bcq" / "bcq.safetensors")
    assert sum(row.size_bytes for row in rows) == sum(t.numel() * t.element_size() for t in stored.values())
    assert total == sum(row.count for row in rows)
    coded = [row for row in rows if row.settings is not None]
    assert [row.rule for row in coded] == ["embedding", "default", "*.o_proj"]
    assert sum(row.size_bytes for row in coded) * 8 / sum(row.weights for row in coded) == summary.bits_per_weight


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--json"], []):
        with pytest.raises(SystemExit) as ended:
            main(["compress", str(model), "--plan", "mixed-3-4", "--dry-run", "--out", str(tmp_path / "out"), *options])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        if options:
            rules = [row["rule"] for row in json.loads(shown)]
            assert rules == ["(kept)", "default", "*.o_proj", "*.down_proj"]
    assert "down_proj" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_keeps_everything_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keeps every weight"):
        compress_model(model, tmp_path / "bcq", CompressPlan(rules=(PlanRule(pattern="*", keep=True),)))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_output_are_compressed_when_the_plan_says_so(tied: bool, tmp_path: Path) -> None:
    source = tiny_model_directory(tmp_path / "full", with_tokenizer=False, tie_embeddings=tied)
    eight = ModulePlan(bits=8, group_size=64)
    plan = CompressPlan(embedding=eight, output=None if tied else eight)
    summary = compress_model(source, tmp_path / "bcq", plan)
    found = dict(iter_tensors(tmp_path / "bcq"))
    for name, weight in iter_tensors(source):
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert 0 < float((found[name] - weight).norm() / weight.norm()) < 0.01
    assert {"embed_tokens"} | (set() if tied else {"lm_head"}) <= set(summary.by_type())
    logits, full = _logits(tmp_path / "bcq"), _logits(source)
    assert float((logits - full).norm() / full.norm()) < 0.5
    if tied:
        with pytest.raises(ConfigError, match="tied"):
            compress_model(source, tmp_path / "other", CompressPlan(output=eight))


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    source = tiny_model_directory(tmp_path / "full", with_tokenizer=False)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight: .*not finite"):
        compress_model(source, tmp_path / "bcq", CompressPlan())
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_divergence_is_told_by_language_and_equals_a_plain_sum(model: Path, tmp_path: Path) -> None:
    compress_model(model, tmp_path / "bcq", CompressPlan(default=ModulePlan(bits=2, group_size=32)))
    full, other = load_model(model).decoder, load_model(tmp_path / "bcq").decoder
    batch = replace(packed_rows(4, 24, 384, seed=5), sources=("ko", "en", "ko", "en"))
    found = divergence_by_language(full, other, [batch])
    assert list(found) == ["en", "ko"]
    meta = ForwardMeta(positions=batch.positions, document_ids=batch.document_ids)
    with torch.no_grad():
        one = full.output(full(batch.tokens, meta)).logits().double().log_softmax(-1)
        two = other.output(other(batch.tokens, meta)).logits().double().log_softmax(-1)
    per_token = torch.nn.functional.kl_div(two, one, log_target=True, reduction="none").sum(-1)
    for language, rows in (("ko", [0, 2]), ("en", [1, 3])):
        counted = batch.weights[rows] > 0
        assert found[language].kl == pytest.approx(float(per_token[rows][counted].mean()), rel=1e-4)
        same = (one.argmax(-1) == two.argmax(-1))[rows][counted].double().mean()
        assert found[language].top1 == pytest.approx(float(same))
        assert found[language].kl_stderr > 0
    whole = divergence(full, other, [batch])
    assert whole.tokens == found["ko"].tokens + found["en"].tokens
    assert found["en"].kl != found["ko"].kl


@pytest.mark.parametrize("name", resource_names("launch/compress"))
def test_every_shipped_plan_is_valid(name: str) -> None:
    from hcx.artifacts import find_resource

    load_config(CompressPlan, find_resource(name), ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "bits = 9: allowed: 1 to 8"),
        (["--bits", "2", "--group-size", "3"], "group_size = 3"),
        (["--bits", "2", "--method", "nearest"], "alternating"),
        ([], "--bits N"),
        (["--plan", "bcq5"], "did you mean 'bcq4'"),
        (["--bits", "2", "--report"], "--shards"),
    ],
)
def test_the_command_answers_mistakes_with_a_message_and_exit_2(
    arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(model), "--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_compresses_and_keeps_what_was_there(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", str(model), "--bits", "2", "--group-size", "32", "--out", str(tmp_path / "bcq"), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["bits_per_weight"] == pytest.approx(3.0)
    before = read_manifest(tmp_path / "bcq")
    with pytest.raises(SystemExit) as again:
        main(arguments)
    assert again.value.code == 2
    assert "already exists" in capsys.readouterr().err
    assert read_manifest(tmp_path / "bcq") == before


def test_a_plan_is_taken_by_shipped_name_or_from_a_file_of_ones_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("default: {bits: 2, group_size: 32}\nrules:\n- {pattern: '*.o_proj', bits: 5}\n")
    for plan, options, bits in (("mine.yaml", [], {2, 5}), ("bcq3", ["--bits", "6", "--no-offset"], {6})):
        out = f"out-{plan}"
        with pytest.raises(SystemExit) as ended:
            main(["compress", str(model), "--plan", plan, *options, "--out", out, "--json"])
        assert ended.value.code == 0
        modules = json.loads(capsys.readouterr().out)["modules"].values()
        assert {module["bits"] for module in modules} == bits


def test_the_report_reads_the_text_that_the_model_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, full = tmp_path / "shards", tmp_path / "full"
    vocab_size = tiny_shards(tmp_path).vocab_size
    with new_artifact(full, "model", None, [artifact_input("shards", shards)]) as artifact:
        tiny_model_directory(artifact.path, with_tokenizer=False, vocab_size=vocab_size)
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(full), "--bits", "3", "--report", "--out", str(tmp_path / "bcq"), "--json"])
    assert ended.value.code == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert {row["language"] for row in quality} == {"ko", "en", "code"}
    coded = [row for row in quality if row["model"] != "full precision"]
    assert all(row["kl"] > 0 and row["tokens_per_s"] > 0 for row in coded)
    assert {row["numerics"] for row in coded} == {"reference", "fast"}
    page = (tmp_path / "bcq-report" / "page" / "index.html").read_text()
    stored = json.loads((tmp_path / "bcq-report" / "quality" / "quality.json").read_text())["models"]
    assert [model["numerics"] for model in stored] == ["reference", "reference", "fast"]
    sizes = [sum(p.stat().st_size for p in d.glob("*.safetensors")) for d in (full, tmp_path / "bcq")]
    assert [model["file_bytes"] for model in stored] == [sizes[0], sizes[1], sizes[1]]
    for row in coded:
        base = next(r for r in quality if r["language"] == row["language"] and r["model"] == "full precision")
        change = row["difference"]
        assert change["value"] == pytest.approx(row["bits_per_byte"] - base["bits_per_byte"], abs=1e-9)
        assert change["low"] < change["value"] < change["high"]
        assert f"p = {change['p_value']:.2g}" in page
