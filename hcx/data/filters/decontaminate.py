"""Finds evaluation items in training text by common n-grams, and takes them out.

- **English and code**: 13 consecutive words, as GPT-3 was checked (Brown et al. 2020, arXiv 2005.14165, appendix C);
  words are runs of letters, digits and underscores in lower case.
- **Korean** (items of which at least 30 % of the letters are Hangul): 25 consecutive characters, white space and
  punctuation left out. Thirteen Korean words are a paragraph; the spacing of the same sentence varies from copy to
  copy; and stock openings of questions ("which of these is not right") have about 15 syllables, so 25 is beyond them.

An item shorter than that is looked for whole if it has at least 8 words or 15 characters; shorter ones match by
accident, so they are not looked for, and counted as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from hcx.config import Config
from hcx.data.document import Document
from hcx.data.extract import hangul_share
from hcx.data.filters.evaluation import ItemSource

_TOKEN = re.compile(r"\w+")
_HANGUL = re.compile("[\uac00-\ud7a3]")
_KOREAN_SHARE = 0.3
_MIN_WORDS = 8
_MIN_CHARACTERS = 15


class DecontaminateConfig(Config):
    """Which evaluation items must not be in the training text."""

    against: tuple[ItemSource, ...] = Field(min_length=1)
    """Where the items are read from when the shards are built."""
    words: int = Field(default=13, ge=_MIN_WORDS)
    """Consecutive words that an English or code item and a document must share."""
    korean_characters: int = Field(default=25, ge=_MIN_CHARACTERS)
    """Consecutive characters that a Korean item and a document must share."""
    action: Literal["drop", "cut"] = "drop"
    """Leave the whole document out, or only the lines that hold what is shared."""


Owner = tuple[str, int]
"""The set and the number of an item."""


@dataclass
class SetCounts:
    """One evaluation set, as looked for.

    Attributes:
        items: how many there are.
        too_short: how many were not looked for.
        found: numbers of the items found.
        documents: documents in which one was found.
    """

    items: int = 0
    too_short: int = 0
    found: set[int] = field(default_factory=set)
    documents: int = 0

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "items": self.items,
            "too_short": self.too_short,
            "items_found": len(self.found),
            "found": sorted(self.found),
            "documents": self.documents,
        }


class _Index:
    """n-grams of items, and items shorter than one by how they begin: two look-ups per place of a document.

    Args:
        length: units (words or characters) per n-gram.
        least: units of the shortest item that is looked for.
    """

    def __init__(self, length: int, least: int) -> None:
        self._length, self._least = length, least
        self._ngrams: dict[str, list[Owner]] = {}
        self._short: dict[str, list[tuple[tuple[str, ...], Owner]]] = {}

    def __bool__(self) -> bool:
        return bool(self._ngrams or self._short)

    def add(self, units: tuple[str, ...], owner: Owner) -> bool:
        """Adds an item; false if it is too short."""
        if len(units) < self._least:
            return False
        if len(units) < self._length:
            self._short.setdefault(" ".join(units[: self._least]), []).append((units, owner))
        for start in range(len(units) - self._length + 1):
            owners = self._ngrams.setdefault(" ".join(units[start : start + self._length]), [])
            if owner not in owners:
                owners.append(owner)
        return True

    def matches(self, units: tuple[str, ...]) -> Iterator[tuple[int, int, list[Owner]]]:
        """(first unit, number of units, whose) of everything that a document shares."""
        for start in range(len(units) - self._length + 1 if self._ngrams else 0):
            found = self._ngrams.get(" ".join(units[start : start + self._length]))
            if found:
                yield start, self._length, found
        for start in range(len(units) - self._least + 1 if self._short else 0):
            for item, owner in self._short.get(" ".join(units[start : start + self._least]), ()):
                if units[start : start + len(item)] == item:
                    yield start, len(item), [owner]


class Decontaminator:
    """Looks for evaluation items in documents.

    Args:
        items: set -> the texts of its items.
        config: lengths and what to do.
    """

    def __init__(self, items: Mapping[str, Iterable[str]], config: DecontaminateConfig) -> None:
        self._config = config
        self.sets: dict[str, SetCounts] = {}
        self._words = _Index(config.words, _MIN_WORDS)
        self._characters = _Index(config.korean_characters, _MIN_CHARACTERS)
        for name, texts in items.items():
            counts = self.sets.setdefault(name, SetCounts())
            for number, text in enumerate(texts):
                counts.items += 1
                counts.too_short += not self._add(name, number, text)

    def _add(self, name: str, number: int, text: str) -> bool:
        words = _TOKEN.findall(text.lower())
        if hangul_share(text) >= _KOREAN_SHARE:
            return self._characters.add(tuple("".join(words).replace("_", "")), (name, number))
        return self._words.add(tuple(words), (name, number))

    def find(self, text: str) -> tuple[set[Owner], list[tuple[int, int]]]:
        """The (set, item number) of what is shared with a text, and where: (begin, end) in characters."""
        owners: set[Owner] = set()
        places: list[tuple[int, int]] = []
        lower = text.lower()
        if len(lower) != len(text):
            # Rare letters change their length; their own spelling keeps the places right.
            lower = text
        spans = [match.span() for match in _TOKEN.finditer(lower)]
        words = [lower[begin:end] for begin, end in spans]
        for start, length, found in self._words.matches(tuple(words)):
            owners.update(found)
            places.append((spans[start][0], spans[start + length - 1][1]))
        if self._characters and _HANGUL.search(text):
            where = [place for begin, end in spans for place in range(begin, end) if lower[place] != "_"]
            for start, length, found in self._characters.matches(tuple("".join(words).replace("_", ""))):
                owners.update(found)
                places.append((where[start], where[start + length - 1] + 1))
        return owners, places

    def clean(self, document: Document) -> Document | None:
        """The document without what it shares with items; None if it is to be left out."""
        owners, places = self.find(document.text)
        if not owners:
            return document
        for name, number in owners:
            self.sets[name].found.add(number)
        for name in {name for name, _ in owners}:
            self.sets[name].documents += 1
        if self._config.action == "drop":
            return None
        text = document.text
        while places:
            text = _without_lines(text, places)
            # Lines that were apart stand together now.
            _, places = self.find(text)
        return document.with_text(text) if text.strip() else None


def _without_lines(text: str, places: Iterable[tuple[int, int]]) -> str:
    kept = []
    begin = 0
    bounds = sorted(places)
    for line in text.splitlines(keepends=True):
        end = begin + len(line)
        if not any(first < end and last > begin for first, last in bounds):
            kept.append(line)
        begin = end
    return "".join(kept)
