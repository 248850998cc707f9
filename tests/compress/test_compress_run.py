"""Compressing a model directory: plan, files, divergence, errors that lose nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from hcx.artifacts import read_manifest, resource_names, verify
from hcx.cli.main import main
from hcx.compress import CompressPlan, ModulePlan, PlanRule, compress_model
from hcx.compress.divergence import divergence
from hcx.config import load_config
from hcx.errors import ConfigError
from hcx.model.load import iter_tensors, load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.batches import packed_rows
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


def test_an_interrupted_compression_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(model, tmp_path / "bcq", CompressPlan(), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_matches_nothing_is_refused(model: Path, tmp_path: Path) -> None:
    plan = CompressPlan(rules=(PlanRule(pattern="*.dwon_proj", bits=2),))
    with pytest.raises(ConfigError, match=r"rules\.0\.pattern = '\*\.dwon_proj' matches no linear layer"):
        compress_model(model, tmp_path / "bcq", plan)


@pytest.mark.parametrize("name", resource_names("launch/compress"))
def test_every_shipped_plan_is_valid(name: str) -> None:
    from hcx.artifacts import find_resource

    load_config(CompressPlan, find_resource(name), ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "bits = 9; allowed: 1 to 8"),
        (["--bits", "2", "--group-size", "3"], "group_size = 3"),
        (["--bits", "2", "--method", "nearest"], "alternating"),
        ([], "--bits N"),
        (["--plan", "launch/compress/none.yaml"], "none.yaml"),
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
