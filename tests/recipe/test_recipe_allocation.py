"""`--average-bits`: sensitivities on held-out text, the exact allocation, and a model made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hcx.cli.main import main
from hcx.compress import Calibration, CompressPlan, ModulePlan, collect, compress_model
from hcx.compress.calibration_text import calibration_batches
from hcx.compress.divergence import divergence_by_language
from hcx.compress.text_reader import TextReader
from hcx.data import ShardSet
from hcx.errors import ConfigError, DataError
from hcx.model.load import ModelFiles, load_model
from hcx.recipe.allocation import Reading, Sensitivities, allocate_bits, read_sensitivities
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_model_directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("allocation")
    tiny_model_directory(root / "full", with_tokenizer=False)
    tiny_shards(root, documents=15, vocab_size=384)
    return root


SMALL = Reading(max_documents=2, seq_len=64)
BASE = CompressPlan(default=ModulePlan(group_size=32, method="greedy"))


def test_a_fractional_average_is_met_and_takes_no_more_than_uniform_planes(made: Path, tmp_path: Path) -> None:
    found = allocate_bits(made / "full", made / "shards", 2.5, BASE, (1, 2, 3, 4), reading=SMALL)
    assert 2.2 < found.average_bits <= 2.5
    summary = compress_model(made / "full", tmp_path / "mixed", found.plan)
    assert summary.bits_per_weight <= 2.5 * (1 + 16 / 32) + 1e-9
    assert set(found.loss) == {"ko", "en", "code"}
    # Every group's rise was read at every width, and the plan's predicted rise is the sum of its choices.
    assert found.allocation.loss == pytest.approx(
        sum(sum(found.rises[name][bits].values()) / 3 for name, bits in found.allocation.bits.items())
    )
    uniform = sum(sum(rises[2].values()) / 3 for rises in found.rises.values())
    assert found.allocation.loss <= uniform  # 2 bits everywhere would have been within the budget


def test_the_command_chooses_and_compresses(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compress", str(made / "full"), "--average-bits", "3.5", "--by", "type", "--group-size", "32"]
    arguments += ["--method", "greedy", "--shards", str(made / "shards"), "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bits_per_weight"] <= 3.5 * 1.5 + 1e-9
    bits = {name: module["bits"] for name, module in answer["modules"].items()}
    assert bits["model.layers.0.mlp.up_proj"] == bits["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("by", ["layer", "type"])
def test_hidden_states_kept_before_a_group_change_no_reading(
    made: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    default = ModulePlan(group_size=32, method="greedy")
    arguments = (made / "full", made / "shards", default, (1, 3), by)
    kept = read_sensitivities(*arguments, reading=SMALL)
    keep = TextReader.keep
    monkeypatch.setattr(TextReader, "keep", lambda reader, block: keep(reader, 0))
    assert read_sensitivities(*arguments, reading=SMALL) == kept


def test_divergence_is_read_on_rows_spread_over_the_documents(made: Path) -> None:
    shards = ShardSet.open(made / "shards")
    whole = Reading(max_documents=4, seq_len=32).text(shards, ["ko", "en"])
    assert max(len(batch.sources) for batch in whole) == 4
    rows = {
        name: [t for b in whole for t, s in zip(b.tokens, b.sources, strict=True) if s == name] for name in ("ko", "en")
    }
    reading = Reading("divergence", max_documents=4, max_rows=5, seq_len=32)
    text = reading.text(shards, ["ko", "en"])
    assert [batch.sources for batch in text] == [("ko",) * 4, ("ko",), ("en",) * 4, ("en",)]
    for name, batches in (("ko", text[:2]), ("en", text[2:])):
        found, count = torch.cat([batch.tokens for batch in batches]), len(rows[name])
        assert count > 6
        assert torch.equal(found, torch.stack([rows[name][place * count // 5] for place in range(5)]))
    default = ModulePlan(group_size=32, method="greedy")
    read = read_sensitivities(made / "full", made / "shards", default, (1, 4), "type", ("ko", "en"), reading)
    full, changed = load_model(made / "full").decoder, load_model(made / "full").decoder
    with torch.no_grad():
        for stem, part in changed.linears().items():
            if stem.endswith("down_proj"):
                part.source.weight.copy_(
                    default.model_copy(update={"bits": 1}).quantize(part.source.weight).dequantize()
                )
    for name, told in divergence_by_language(full, changed, text).items():
        assert read.loss[name] == pytest.approx(0.0, abs=1e-5)
        assert read.rises["*.down_proj"][1][name] == pytest.approx(told.kl, rel=1e-3)
    assert all(rises[4][name] < rises[1][name] for rises in read.rises.values() for name in ("ko", "en"))
    with pytest.raises(ConfigError, match="max_rows = 0"):
        Reading(max_rows=0).text(shards, ["ko"])


def test_sensitivities_are_read_with_the_quantizer_in_question(made: Path) -> None:
    """A layer whose outputs are kept suffers less than one whose weights are; its harm is read as such."""
    shards = ShardSet.open(made / "shards")
    default = ModulePlan(group_size=32, feedback=True)
    batches = calibration_batches(Calibration(tokens=2048, seq_len=64), 64, None, shards)
    with ModelFiles(made / "full") as files:
        statistics = dict(collect(files.config, files.read, batches))
    arguments = (made / "full", made / "shards", default, (2,), "type", ("ko",))
    reading = Reading("divergence", max_documents=4, max_rows=8, seq_len=64)
    read = read_sensitivities(*arguments, reading=reading, statistics=statistics)
    full, changed = load_model(made / "full").decoder, load_model(made / "full").decoder
    plan = default.model_copy(update={"bits": 2})
    with torch.no_grad():
        for stem, part in changed.linears().items():
            if stem.endswith("down_proj"):
                part.source.weight.copy_(plan.quantize(part.source.weight, statistics[stem]).dequantize())
    told = divergence_by_language(full, changed, reading.text(shards, ["ko"]))["ko"]
    assert read.rises["*.down_proj"][2]["ko"] == pytest.approx(told.kl, rel=1e-3)
    with pytest.raises(ConfigError, match="need calibration text"):
        read_sensitivities(*arguments, reading=reading)
    found = allocate_bits(
        made / "full", made / "shards", 2.0, CompressPlan(default=default), (2,), "type", {"ko": 1.0}, reading,
        calibration=batches,
    )  # fmt: skip
    assert found.rises == read.rises


def test_kept_sensitivities_are_read_back_and_only_for_the_same_settings(made: Path, tmp_path: Path) -> None:
    read = read_sensitivities(made / "full", made / "shards", BASE.default, (1, 2), "type", ("ko",), SMALL)
    settings = {"by": "type", "widths": (1, 2), "reading": {"max_rows": None}}
    read.keep(tmp_path / "kept.json", settings)
    assert Sensitivities.kept(tmp_path / "kept.json", settings) == read
    with pytest.raises(ConfigError, match=r"by: type there, layer now.*name another file"):
        Sensitivities.kept(tmp_path / "kept.json", {**settings, "by": "layer"})
    for text in (
        "",
        "[]",
        "{}",
        '{"settings": 3, "shapes": {}, "groups": {}, "loss": {}, "rises": {}}',
        '{"settings": {}, "shapes": [1], "groups": {}, "loss": {}, "rises": {}}',
    ):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(DataError, match="no file of sensitivities"):
            Sensitivities.kept(tmp_path / "broken.json", settings)


def test_the_command_allocates_for_the_quantizer_that_keeps_outputs(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.yaml"
    text.write_text("calibration: {tokens: 2048, seq_len: 64}\ndefault: {feedback: true, group_size: 32}\n")
    arguments = ["compress", str(made / "full"), "--plan", str(text), "--average-bits", "2.5", "--by", "type", "--json"]
    arguments += ["--shards", str(made / "shards"), "--calibration", str(made / "shards"), "--out"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, str(tmp_path / "out")])
    answer = capsys.readouterr()
    assert stopped.value.code == 0, answer.err
    assert json.loads(answer.out)["bits_per_weight"] <= 2.5 * 1.5 + 1e-9
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "already exists" in capsys.readouterr().err


def test_bad_requests_say_what_is_allowed(made: Path) -> None:
    for change, message in (
        ({"average_bits": 9.0}, "1 to 6"),
        ({"widths": (2, 2)}, "different numbers from 1 to 8"),
        ({"shares": {"jp": 1.0}}, "no held-out text of jp; there is ko, en, code"),
        ({"by": "block"}, "allowed: layer, type, matrix"),
    ):
        with pytest.raises(ConfigError, match=message):
            allocate_bits(made / "full", made / "shards", **{"average_bits": 2.0, "base": BASE, **change})
