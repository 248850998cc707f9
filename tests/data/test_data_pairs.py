"""Pairs to train translation on: split by file, disjoint from what is scored, in the form in which it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hcx.artifacts import verify
from hcx.data.fetch import fetch
from hcx.data.pairs import VALIDATION_BELOW, training_pairs
from hcx.data.shipped import HELD_OUT_FRACTION, name_fraction, translation_pairs
from hcx.errors import DataError
from hcx.evals.items import translation_prompt

SENTENCES = {
    "train": [
        ("변경한 내용을 보관하려면 저장 단추를 누르십시오.", "Press the Save button to keep your changes."),
        ("문서를 닫으려면 닫기 단추를 누르십시오.", "Press the Close button to close the document."),
        ("새 문서를 만들려면 새로 만들기를 누르십시오.", "Press the New button to make a new document."),
        ("글꼴을 바꾸려면 글꼴 목록을 여십시오.", "Open the list of fonts to change the font."),
        ("쪽 번호를 넣으려면 삽입을 누르십시오.", "Press Insert to put in the page number."),
    ],
    "validation": [("표를 지우려면 표 지우기를 누르십시오.", "Press Delete Table to remove the whole table.")],
    "scored": [("이 문장은 시험에만 나오는 문장입니다.", "This sentence only ever occurs in the test.")],
}


def file_named(wanted: Callable[[float], bool]) -> str:
    return next(name for n in range(10_000) if wanted(name_fraction(name := f"shared/{n}.html")))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    known = translation_pairs()[0]
    files = {
        # The last two must not be trained on: one is scored, of the other one side is for validation.
        file_named(lambda fraction: fraction >= VALIDATION_BELOW): [
            *SENTENCES["train"],
            (known["ko"], "Something else is written on this side."),
            ("이 문장은 다른 곳에도 있는 문장입니다.", SENTENCES["validation"][0][1]),
        ],
        file_named(lambda fraction: HELD_OUT_FRACTION <= fraction < VALIDATION_BELOW): SENTENCES["validation"],
        file_named(lambda fraction: fraction < HELD_OUT_FRACTION): SENTENCES["scored"],
    }
    for side, code in ((0, "ko"), (1, "en-US")):
        for name, pairs in files.items():
            path = tmp_path / "packages/usr/share/libreoffice/help" / code / "text" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "".join(f"<p id='p{number}'>{pair[side]}</p>" for number, pair in enumerate(pairs)), encoding="utf-8"
            )
    for language, text in (("ko", "문을 열어 두는 시간을 정하십시오."), ("en", "Choose how long the door stays open.")):
        path = tmp_path / f"packages/homeassistant/components/door/translations/{language}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"title": text}, ensure_ascii=False), encoding="utf-8")
    return tmp_path / "packages"


def test_pairs_are_split_by_file_and_no_side_is_scored(packages: Path) -> None:
    pairs = training_pairs(packages)
    help_pages = [pair for pair in pairs if pair["source"] == "libreoffice-help"]
    for split in ("train", "validation"):
        found = [(pair["ko"], pair["en"]) for pair in help_pages if pair["split"] == split]
        assert found == SENTENCES[split]
    assert len(pairs) == len(help_pages) + 1


def test_documents_have_the_form_of_the_evaluation(packages: Path, tmp_path: Path) -> None:
    counts = fetch("translation", tmp_path / "out", packages)
    rows = [json.loads(line) for line in (tmp_path / "out" / "ko-en.jsonl").read_text(encoding="utf-8").splitlines()]
    assert counts["ko-en"]["documents"] == len(rows) == 4
    assert verify(tmp_path / "out").kind == "text"
    # Five pairs of a file: four, then one.
    assert [row["text"].count("Korean: ") for row in rows[:2]] == [4, 1]
    ko, en = SENTENCES["train"][4]
    assert rows[1]["text"] == translation_prompt(ko, "ko-en").rpartition("\n\n")[2] + f" {en}\n"
    assert {row["licence"] for row in rows} == {"MPL-2.0", "Apache-2.0"}
    assert {row["split"] for row in rows} == {"train", "validation"}


def test_packages_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="libreoffice-help-ko"):
        fetch("translation", tmp_path / "out", tmp_path)
