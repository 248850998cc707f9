"""The comparison of tokenizers, and the shipped recipes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hcx.artifacts import find_resource, resource_names
from hcx.cli.main import main
from hcx.config import load_config
from hcx.data.recipe import DataRecipe
from hcx.errors import DataError
from hcx.testing.tiny import TINY_TEXT
from hcx.tokenizer import train_tokenizer
from hcx.tokenizer.gold import gold_sentence
from hcx.tokenizer.peers import PEERS, Measured
from hcx.tokenizer.recipe import TokenizerRecipe
from hcx.tokenizer.report import boundary_report, tokenizer_report


def rows_of(kind: str, report: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in report if row["kind"] == kind]


def test_bytes_per_token_are_bytes_by_tokens_for_each_pair_of_tokenizer_and_text(tmp_path) -> None:
    for size in (384, 512):
        train_tokenizer(TINY_TEXT, size).save(tmp_path / str(size))
    rows = tokenizer_report([tmp_path / "384", tmp_path / "512"], [("ko", TINY_TEXT[0]), ("code", TINY_TEXT[4])])
    assert [(row.vocab_size, row.text) for row in rows] == [(384, "ko"), (384, "code"), (512, "ko"), (512, "code")]
    for row in rows:
        assert row.bytes_per_token == row.num_bytes / row.tokens
        assert row.lossless
    assert rows[0].num_bytes == len(TINY_TEXT[0].encode())
    assert rows[2].bytes_per_token > rows[0].bytes_per_token  # more merges, fewer tokens
    assert rows[0].bytes_per_token > rows[0].characters_per_token


def test_an_empty_text_is_refused(tmp_path) -> None:
    train_tokenizer(TINY_TEXT, 384).save(tmp_path)
    with pytest.raises(DataError, match="empty text"):
        tokenizer_report([tmp_path], [("nothing", "")])


def test_the_command_measures_held_out_text_of_each_language(tmp_path, capsys) -> None:
    train_tokenizer(TINY_TEXT, 384).save(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["tokenizer", "report", str(tmp_path), "--text", "held-out:ko", "--text", "held-out:code", "--json"])
    assert not stop.value.code
    korean, code = rows_of("compression", json.loads(capsys.readouterr().out))
    assert (korean["text"], code["text"]) == ("held-out:ko", "held-out:code")
    assert korean["lossless"]
    assert code["lossless"]
    assert korean["num_bytes"] > 100_000
    with pytest.raises(SystemExit) as stop:
        main(["tokenizer", "report", str(tmp_path), "--text", "held-out:jp"])
    assert stop.value.code == 2
    assert "valid: held-out:ko" in capsys.readouterr().err


def test_tokens_per_syllable_counts_the_tokens_that_hold_a_part_of_one() -> None:
    pieces = {"가": [b"\xea\xb0", b"\x80"], "가나 b": ["가나".encode(), b" b"], "ab": [b"ab"]}

    def tokens_per_syllable(text: str) -> float | None:
        measured = Measured("x", 9, lambda text: list(range(len(pieces[text]))), lambda i: pieces[text][i], "x")
        (row,) = tokenizer_report([measured], [(text, text)])
        assert row.lossless
        return row.tokens_per_syllable

    assert tokens_per_syllable("가") == 2.0
    assert tokens_per_syllable("가나 b") == 0.5
    assert tokens_per_syllable("ab") is None


def test_a_tokenizer_that_changes_text_is_called_not_lossless() -> None:
    lossy = Measured("lossy", 9, lambda text: [0], lambda i: b"other", "x")
    assert not tokenizer_report([lossy], [("t", "가나다")])[0].lossless
    (row,) = boundary_report([lossy], {"judge": [gold_sentence("학교에서", [("학교에서", ["학교", "에서"])])]})
    assert row.f1 is None
    assert "are not the text" in row.reason


def test_the_page_and_the_json_hold_every_row_and_say_what_is_missing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HCX_SHARED_DATA", str(tmp_path / "nowhere"))
    train_tokenizer(TINY_TEXT, 384).save(tmp_path / "<mine>")
    (tmp_path / "text.txt").write_text("학교에서 한국어를 배운다.", encoding="utf-8")
    arguments = [str(tmp_path / "<mine>"), "--text", str(tmp_path / "text.txt"), "--from", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main(["tokenizer", "report", *arguments, "--out", str(tmp_path / "page")])
    assert not stop.value.code
    printed = capsys.readouterr().out
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "page" / "report.json").read_text(encoding="utf-8"))
    (compression,) = rows_of("compression", report)
    missing = [row["reason"] for row in rows_of("unavailable", report)]
    assert len([reason for reason in missing if "it comes with" in reason]) == len(PEERS)
    assert f"{compression['bytes_per_token']:.3f}" in page
    assert "&lt;mine&gt;" in page
    assert "<mine>" not in page
    assert "<script" not in page
    assert "http" not in page
    for reason in missing:
        assert reason in printed


def test_a_report_of_nothing_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tokenizer", "report"])
    assert stop.value.code == 2
    assert "no tokenizer named" in capsys.readouterr().err


@pytest.mark.parametrize("name", resource_names("tokenizer"))
def test_every_shipped_tokenizer_recipe_loads_and_names_a_data_recipe(name: str) -> None:
    recipe = load_config(TokenizerRecipe, find_resource(name))
    load_config(DataRecipe, find_resource(recipe.data))
    assert recipe.vocab_size % 128 == 0
