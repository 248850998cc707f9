"""Calibration: statistics block by block, text by shares, scaling that changes no function, plans that read text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hcx.artifacts import artifact_input, new_artifact
from hcx.cli.main import main
from hcx.compress import Calibration, CompressPlan, ModulePlan, PlanRule, collect, compress_model
from hcx.compress.calibration import BlockWalk, Calibrator, linear_parts
from hcx.compress.calibration_text import calibration_batches
from hcx.compress.divergence import divergence
from hcx.compress.scaling import ScaleSearch, fold_scales
from hcx.compress.uniform import quantize_uniform
from hcx.data import ShardSet
from hcx.errors import ConfigError, DataError
from hcx.model.decoder import Decoder
from hcx.model.load import ModelFiles, iter_tensors, load_model
from hcx.model.meta import ForwardMeta
from hcx.model.parts.linear import LinearPart
from hcx.testing.batches import packed_rows
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_config, tiny_model_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("models") / "full", with_tokenizer=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return tiny_shards(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
def test_statistics_block_by_block_are_those_of_one_whole_forward(architecture: str, tmp_path: Path) -> None:
    directory = tiny_model_directory(tmp_path / "full", architecture, with_tokenizer=False)
    batches = [packed_rows(3, 24, 384, seed=seed) for seed in range(2)]
    with ModelFiles(directory) as files:
        found = dict(collect(files.config, files.read, batches))
    decoder = load_model(directory).decoder
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(part: LinearPart, arguments: tuple[torch.Tensor, ...]) -> None:
        # [seq, batch, in]; the batch being run is the last one appended below.
        rows = arguments[0].transpose(0, 1)[current[0].weights > 0].double()
        for block in part.blocks:
            seen.setdefault(block.stem, []).append(rows)

    for part in dict.fromkeys(decoder.linears().values()):
        part.register_forward_pre_hook(watch)
    current = [batches[0]]
    with torch.no_grad():
        for batch in batches:
            current[0] = batch
            decoder(batch.tokens, ForwardMeta(positions=batch.positions, document_ids=batch.document_ids))
    assert set(found) == set(seen) == set(decoder.linears())
    for stem, rows in seen.items():
        inputs = torch.cat(rows)
        assert found[stem].tokens == len(inputs)
        expected = inputs.t() @ inputs / len(inputs)
        torch.testing.assert_close(found[stem].gram.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
        torch.testing.assert_close(found[stem].moments.double(), inputs.square().mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
def test_scales_that_are_folded_in_change_no_output(architecture: str, tmp_path: Path) -> None:
    directory = tiny_model_directory(tmp_path / "full", architecture, with_tokenizer=False)
    with ModelFiles(directory) as files:
        walk = BlockWalk(files.config, files.read, [packed_rows(2, 24, 384)])
        block, other = walk.block(), walk.block()
        parts = linear_parts(block)
        grams = [one.gram for one in walk.statistics(block, parts)]
        # A trial that favours any scaling over none: it says that only the unscaled weight cannot be read back.
        plain = {
            one.stem: part.source.weight[one.rows[0] : one.rows[1]].clone() for part in parts for one in part.blocks
        }

        def trial(stem: str, weight: torch.Tensor) -> torch.Tensor:
            return weight * 0 if torch.equal(weight, plain[stem]) else quantize_uniform(weight, 3, 32).dequantize()

        changed = fold_scales(block, parts, grams, ScaleSearch(trial))
    assert {name.rsplit(".", 2)[-2] for name in changed} >= {
        "input_layernorm",
        "o_proj",
        "v_proj",
        "down_proj",
        "up_proj",
    }
    (hidden,) = walk.hidden
    meta = ForwardMeta()
    with torch.no_grad():
        torch.testing.assert_close(block(hidden, meta), other(hidden, meta), rtol=2e-4, atol=2e-4)
    parameters = {
        one.name: one.view(dict(block.named_parameters())[local])
        for local, slices in block.parameter_map().items()
        for one in slices
    }
    for name, tensor in changed.items():
        assert torch.equal(tensor, parameters[name])


def _kl(full: Decoder, directory: Path) -> float:
    return divergence(full, load_model(directory).decoder, [packed_rows(8, 32, 384, seed=9)]).kl


def test_what_reads_text_comes_nearer_to_the_model_and_says_so(model: Path, tmp_path: Path) -> None:
    """Random weights, random text: calibration text and the text that is measured are alike, and never the same."""
    text = [packed_rows(8, 32, 384, seed=seed) for seed in range(4)]
    full = load_model(model).decoder
    plans = {
        "plain": CompressPlan(default=ModulePlan(bits=2, group_size=32)),
        "importance": CompressPlan(default=ModulePlan(bits=2, group_size=32, importance=True)),
        "feedback": CompressPlan(default=ModulePlan(bits=2, group_size=32, feedback=True)),
        "rounded": CompressPlan(default=ModulePlan(bits=2, group_size=32, method="uniform")),
        "scaled": CompressPlan(
            default=ModulePlan(bits=2, group_size=32, method="uniform"), calibration=Calibration(scaling=True)
        ),
    }
    kl = {}
    for name, plan in plans.items():
        summary = compress_model(model, tmp_path / name, plan, calibration=text)
        kl[name] = _kl(full, tmp_path / name)
        assert all((module.output_error is None) == (not plan.needs_calibration) for module in summary.modules)
        assert summary.bits_per_weight == pytest.approx(4.0 if plan.default.method == "uniform" else 3.0)
    assert kl["importance"] < kl["plain"]
    assert kl["feedback"] < 0.9 * kl["plain"]
    assert kl["scaled"] < kl["rounded"]
    stored = json.loads((tmp_path / "feedback" / "compression.json").read_text())
    assert 0 < stored["modules"]["model.layers.0.mlp.up_proj"]["output_error"] < 0.5


def test_a_kept_weight_and_a_rule_of_its_own_hold_beside_calibration(model: Path, tmp_path: Path) -> None:
    plan = CompressPlan(
        default=ModulePlan(bits=3, group_size=32, feedback=True),
        rules=(
            PlanRule(pattern="*.v_proj", keep=True),
            PlanRule(pattern="*.o_proj", method="searched", feedback=False),
        ),
    )
    compress_model(model, tmp_path / "out", plan, calibration=[packed_rows(4, 24, 384)])
    source, found = dict(iter_tensors(model)), dict(iter_tensors(tmp_path / "out"))
    assert torch.equal(
        found["model.layers.0.self_attn.v_proj.weight"], source["model.layers.0.self_attn.v_proj.weight"]
    )
    name = "model.layers.1.self_attn.o_proj.weight"
    expected = ModulePlan(bits=3, group_size=32, method="searched").quantize(source[name].float())
    torch.testing.assert_close(found[name], expected.dequantize())


def test_a_block_that_is_passed_over_leaves_the_next_ones_as_they_would_be(model: Path) -> None:
    """What a run that was interrupted does with the blocks that are there already."""
    text, module = [packed_rows(4, 24, 384)], ModulePlan(bits=3, group_size=32, feedback=True, descent=1)
    with ModelFiles(model) as files:
        whole = Calibrator(files.config, files.read, text, lambda stem, w, s: module.quantize(w, s))
        first, second = whole.next_block(), whole.next_block()
        resumed = Calibrator(files.config, files.read, text, lambda stem, w, s: module.quantize(w, s))
        resumed.skip({f"{stem}.weight": packed.dequantize() for stem, packed in first.packed.items()})
        again = resumed.next_block()
    for stem, packed in second.packed.items():
        assert torch.equal(packed.planes, again.packed[stem].planes)
        assert torch.equal(packed.scales, again.packed[stem].scales)


def test_calibration_text_keeps_to_its_shares_and_to_training_documents(shards: ShardSet) -> None:
    settings = Calibration(tokens=2048, seq_len=64, shares={"ko": 3.0, "code": 1.0})
    batches = calibration_batches(settings, 256, None, shards)
    sources = [source for batch in batches for source in batch.sources]
    assert sources.count("ko") == 24
    assert sources.count("code") == 8
    assert {batch.tokens.shape[1] for batch in batches} == {64}
    held_out = {tuple(int(t) for t in shards.shard("ko", "validation").document(0)[:-1])}
    trained = {
        tuple(int(t) for t in shards.shard("ko", "train").document(n)[:-1])
        for n in range(shards.shard("ko", "train").num_documents)
    }
    pieces: list[list[int]] = [[]]
    for batch in batches:
        for row, source in zip(batch.tokens.tolist(), batch.sources, strict=True):
            for token in row if source == "ko" else []:
                if token == shards.eos_id:
                    pieces.append([])
                else:
                    pieces[-1].append(token)
    whole = {tuple(piece) for piece in pieces[1:-1]}
    assert len(whole & trained) > 5
    assert not whole & held_out
    again = calibration_batches(settings, 256, None, shards)
    assert all(torch.equal(one.tokens, two.tokens) for one, two in zip(batches, again, strict=True))
    assert calibration_batches(settings, 16, None, shards)[0].tokens.shape[1] == 16


def test_bad_calibration_text_is_told_with_its_numbers(shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ko has text for [\d,]+ tokens, its share needs [\d,]+"):
        calibration_batches(Calibration(tokens=10_000_000, seq_len=64), 256, None, shards)
    with pytest.raises(ConfigError, match=r"calibration\.shares\.kr: no such text; valid: code, en, ko"):
        calibration_batches(Calibration(shares={"kr": 1.0}), 256, None, shards)
    with pytest.raises(ConfigError, match="sum to nothing"):
        calibration_batches(Calibration(shares={"ko": 0.0}), 256, None, shards)
    with pytest.raises(ConfigError, match="--calibration DIR"):
        calibration_batches(Calibration(), 256, None)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        calibration_batches(Calibration(texts={"en": ("a.txt",)}), 256, None)
    with pytest.raises(DataError, match="cannot be read"):
        calibration_batches(Calibration(texts={"en": ("a.txt",)}), 256, shards.tokenizer, folder=tmp_path)
    (tmp_path / "a.txt").write_text("language model of the sea and the sky " * 60)
    found = calibration_batches(
        Calibration(texts={"en": ("a.txt",)}, tokens=64, seq_len=32), 256, shards.tokenizer, folder=tmp_path
    )
    assert found[0].tokens.shape == (2, 32)
    assert "language model" in shards.tokenizer.decode(found[0].tokens[0].tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "2", "--method", "gptq"], "method: uniform with feedback: true"),
        (["--bits", "2", "--method", "alternatng"], "did you mean 'alternating'"),
        (["--bits", "2", "--feedback"], "--calibration DIR"),
        (["--bits", "2", "--calibration", "here"], "has no effect"),
        (["--widths", "2,x"], "comma-separated integers"),
        (["--bits", "4", "--widths", "2,3"], "the last of which is bits = 4"),
    ],
)
def test_mistakes_are_answered_with_what_is_valid(
    arguments: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(model), "--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"default": {"method": "uniform", "importance": True}}, {"output": {"feedback": True}}]
)
def test_a_setting_without_effect_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no effect|for the linear layers"):
        CompressPlan.model_validate(change)


def test_the_command_reads_the_text_that_the_model_was_trained_on(
    shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    with new_artifact(full, "model", None, [artifact_input("shards", shards.directory)]) as artifact:
        tiny_model_directory(artifact.path, with_tokenizer=False, vocab_size=shards.vocab_size)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "default: {bits: 2, group_size: 32, feedback: true, descent: 1}\n"
        "calibration: {tokens: 512, seq_len: 64, shares: {ko: 0.5, en: 0.5}}\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(full), "--plan", str(plan), "--out", str(tmp_path / "bcq"), "--json"])
    assert ended.value.code == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    assert all(0 < module["output_error"] < 1 for module in modules.values())


def test_no_text_is_an_error_of_its_own() -> None:
    with pytest.raises(DataError, match="no tokens"):
        BlockWalk(tiny_config(), lambda name: torch.zeros(1), [])


def test_a_rule_that_does_not_go_with_the_default_is_named() -> None:
    nested = {"bits": 4, "widths": (2, 3, 4)}
    with pytest.raises(ValueError, match=r"rules\.1 with what it takes from the default: widths = \[2, 3, 4\]"):
        CompressPlan.model_validate(
            {"default": nested, "rules": ({"pattern": "*.q_proj", "keep": True}, {"pattern": "*.o_proj", "bits": 6})}
        )
    plan = CompressPlan.model_validate(
        {"default": nested, "rules": ({"pattern": "*.o_proj", "bits": 6, "widths": ()},)}
    )
    module = plan.module("model.layers.0.self_attn.o_proj")
    assert module is not None
    assert (module.bits, module.widths) == (6, ())
