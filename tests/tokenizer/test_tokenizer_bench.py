"""The benchmark of encoding: the same work for everyone, in turns, and rows that say what was measured."""

from __future__ import annotations

import csv
import json

import pytest

from hcx.cli.main import main
from hcx.recipe.bench_tokenizer import measure_encoding
from hcx.testing.tiny import TINY_TEXT
from hcx.tokenizer import train_tokenizer


@pytest.mark.parametrize("mode", ["one by one", "batch"])
def test_libraries_with_the_same_vocabulary_give_the_same_ids(mode) -> None:
    rows = measure_encoding(train_tokenizer(TINY_TEXT, 512), {"ko": TINY_TEXT[:2], "code": TINY_TEXT[4:]}, mode, 5)
    assert {row.text for row in rows} == {"ko", "code"}
    libraries = {row.library for row in rows}
    assert {"hcx", "tokenizers"} <= libraries
    for row in rows:
        assert row.same_ids
        assert row.mb_per_s > 0
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.num_bytes == sum(
            len(text.encode()) for text in (TINY_TEXT[:2] if row.text == "ko" else TINY_TEXT[4:])
        )
        if row.library == "hcx":
            assert (row.ratio, row.ratio_low, row.ratio_high) == (1, 1, 1)


def test_the_command_appends_rows_and_prints_json(tmp_path, capsys) -> None:
    train_tokenizer(TINY_TEXT, 512).save(tmp_path / "tokenizer")
    arguments = ["bench", "tokenizer", str(tmp_path / "tokenizer"), "--quick", "--json", "--out"]
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, str(tmp_path / "rows.csv")])
        assert not stop.value.code
        printed = json.loads(capsys.readouterr().out)
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(printed)
    assert {row["library"] for row in rows} == {row["library"] for row in printed}
    assert {row["mode"] for row in rows} == {"one by one", "batch"}


def test_too_few_rounds_for_an_interval_are_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "tokenizer", "--rounds", "2"])
    assert stop.value.code == 2
    assert "--rounds 2" in capsys.readouterr().err
