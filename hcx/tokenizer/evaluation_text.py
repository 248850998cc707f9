"""Text and treebanks that tokenizers are judged on and never learn from, where a user has them.

The folder is named by the environment variable `HCX_SHARED_DATA`; without it, `../shared/data` beside a checkout is
looked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hcx
from hcx.tokenizer.gold import GoldSentence, open_lines, read_kaist, read_klue
from hcx.tokenizer.report import Text

VARIABLE = "HCX_SHARED_DATA"

MAX_LINES = 10_000
"""Of a text: enough for three digits, and a report in seconds."""


def evaluation_folder() -> Path | None:
    """Where the sets lie, if they are there."""
    named = os.environ.get(VARIABLE)
    folder = Path(named) if named else Path(hcx.__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


def out_of_domain_texts(folder: Path) -> list[Text]:
    """Korean prose, film reviews and news, English news, and code: none of it documentation, as the shipped text is.

    Only test and dev parts are read. Sets that are absent are left out.
    """
    found = []
    for name, files, lines in _TEXTS:
        paths = [folder / file for file in files]
        if all(path.is_file() for path in paths):
            taken = [line for path in paths for line in lines(path)][:MAX_LINES]
            found.append(Text(name, "\n".join(taken), "out"))
    return found


def treebanks(folder: Path) -> dict[str, list[GoldSentence]]:
    """Sentences with morphemes that people marked. Sets that are absent are left out."""
    readers = {
        "Kaist treebank, test": ("ud_korean_kaist/kaist.test.jsonl.xz", read_kaist),
        "KLUE dependency parsing, dev": ("klue/klue-dp-v1.1_dev.tsv.xz", read_klue),
    }
    return {name: read(folder / file) for name, (file, read) in readers.items() if (folder / file).is_file()}


def _boddari(path: Path) -> Iterator[str]:
    for line in open_lines(path):
        row = json.loads(line)
        if row["split"] == "test":
            yield row["text"]


def _nsmc(path: Path) -> Iterator[str]:
    return (line.split("\t")[3] for number, line in enumerate(open_lines(path)) if number)


def _ntrex(column: int) -> Callable[[Path], Iterator[str]]:
    return lambda path: (line.split("\t")[column] for number, line in enumerate(open_lines(path)) if number)


def _mbpp(path: Path) -> Iterator[str]:
    for line in open_lines(path):
        row = json.loads(line)
        if row["split"] == "test":
            yield row["code"]


_TEXTS: tuple[tuple[str, tuple[str, ...], Callable[[Path], Iterator[str]]], ...] = (
    (
        "ko prose",
        tuple(
            f"boddari/{name}"
            for name in (
                "book_blog_acorn.jsonl.xz",
                "book_review_nanet.jsonl.xz",
                "fairytales.jsonl",
                "unesco_reports.jsonl.xz",
                "wikinews.jsonl.xz",
            )
        ),
        _boddari,
    ),
    ("ko reviews", ("nsmc/reviews.dev.tsv.xz",), _nsmc),
    ("ko news", ("ntrex/newstest2019.en-ko.tsv",), _ntrex(2)),
    ("en news", ("ntrex/newstest2019.en-ko.tsv",), _ntrex(1)),
    ("code", ("mbpp/sanitized-mbpp.jsonl",), _mbpp),
)
