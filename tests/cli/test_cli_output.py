"""Measured rows on their way into files."""

import csv
from pathlib import Path

import pytest

from hcx.cli.output import append_csv, write_rows


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_below_one_header(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    append_csv(path, [{"case": "a, b", "ms": 1.5}])
    append_csv(path, [{"case": "줄", "ms": 2.5}, {"case": "c", "ms": None}])
    assert read(path) == [{"case": "a, b", "ms": "1.5"}, {"case": "줄", "ms": "2.5"}, {"case": "c", "ms": ""}]


def test_other_columns_move_no_value_below_a_wrong_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append_csv(path, [{"case": "old", "ms": 1, "gone": "x"}])
    append_csv(path, [{"case": "new", "ratio": 0.5, "ms": 2}])
    assert read(path) == [
        {"case": "old", "ratio": "", "ms": "1", "gone": "x"},
        {"case": "new", "ratio": "0.5", "ms": "2", "gone": ""},
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_table_is_wanted_unless_json_was(tmp_path: Path, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_rows([{"case": "a"}], tmp_path / "rows.csv", as_json) is not as_json
    assert capsys.readouterr().out == ('[\n {\n  "case": "a"\n }\n]\n' if as_json else "")
    assert read(tmp_path / "rows.csv") == [{"case": "a"}]
