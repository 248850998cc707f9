"""Where Korean morphemes begin and end in a text: the one door of the analysers.

Only offsets of the surface are used, never the analyser's own forms: contracted morphemes share a syllable, and a cut
is made only between code points that no morpheme spans. The pieces always concatenate to the text.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, Protocol

from hcx.errors import MissingExtra

Granularity = Literal["fine", "coarse"]

HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")
"""Syllables and all blocks of jamo."""


@dataclass(frozen=True)
class Morpheme:
    """A morpheme's place in a line.

    Attributes:
        start, end: code points; several morphemes of one contraction have overlapping places.
        is_tail: a particle, an ending or the copula: what agglutinates behind a stem.
    """

    start: int
    end: int
    is_tail: bool


class Analyser(Protocol):
    """Why these two: the name goes into the ledger of what was learnt, the places are all that learning needs."""

    name: str
    """With its version."""

    def morphemes(self, lines: Sequence[str]) -> Iterator[list[Morpheme]]:
        """The morphemes of each line, in order of their starts."""
        ...


class KiwiAnalyser:
    """Kiwi (package kiwipiepy, LGPL), with the Sejong tag set.

    Args:
        num_workers: threads; the result does not depend on it.

    Raises:
        MissingExtra: kiwipiepy is not installed.
    """

    def __init__(self, num_workers: int = 2) -> None:
        try:
            from kiwipiepy import Kiwi
        except ImportError:
            raise MissingExtra("kiwipiepy", "korean", "learning with morpheme boundaries") from None
        self._kiwi: Any = Kiwi(num_workers=num_workers)
        self.name = f"kiwipiepy {version('kiwipiepy')}"

    def morphemes(self, lines: Sequence[str]) -> Iterator[list[Morpheme]]:
        """The morphemes of each line, in order of their starts."""
        for tokens in self._kiwi.tokenize(iter(lines)):
            yield [Morpheme(t.start, t.start + t.len, _is_tail(t.tag)) for t in tokens if t.len]


class MecabAnalyser:
    """MeCab-ko (package python-mecab-ko), which no tokenizer of ours learns from: an independent judge.

    Raises:
        MissingExtra: python-mecab-ko is not installed.
    """

    def __init__(self) -> None:
        try:
            from mecab import MeCab
        except ImportError:
            raise MissingExtra("python-mecab-ko", "judge", "an analyser that was not used in training") from None
        self._mecab: Any = MeCab()
        self.name = f"python-mecab-ko {version('python-mecab-ko')}"

    def morphemes(self, lines: Sequence[str]) -> Iterator[list[Morpheme]]:
        """The morphemes of each line, in order of their starts."""
        for line in lines:
            yield [
                Morpheme(token.span.start, token.span.end, _is_tail(token.feature.pos))
                for token in self._mecab.parse(line)
            ]


def independent_analyser() -> Analyser | None:
    """An installed analyser that no tokenizer of ours learns from, or none."""
    return MecabAnalyser() if importlib.util.find_spec("mecab") is not None else None


def _is_tail(tag: str) -> bool:
    # Sejong tags: J* particles, E* endings, VCP the copula, which attaches to nouns as a particle does.
    return tag.startswith(("J", "E", "VCP"))


def cuts(line: str, morphemes: Iterable[Morpheme], granularity: Granularity) -> list[int]:
    """Offsets between code points at which a line is cut, ascending, without its ends.

    White space goes with what follows it, and text without Hangul on either side is left whole.

    Args:
        line: the text that was analysed.
        morphemes: its morphemes, in order of their starts.
        granularity: every morpheme, or stem and whole tail.
    """
    found: set[int] = set()
    inside: set[int] = set()
    previous: Morpheme | None = None
    for morpheme in morphemes:
        inside.update(range(morpheme.start + 1, morpheme.end))
        if granularity == "fine":
            found.update((morpheme.start, morpheme.end))
        elif previous is not None and previous.is_tail != morpheme.is_tail:
            found.add(morpheme.start)
        previous = morpheme
    return [
        place
        for place in sorted(found - inside)
        if 0 < place < len(line)
        and not line[place - 1].isspace()
        and not line[place].isspace()
        and (HANGUL.match(line[place - 1]) or HANGUL.match(line[place]))
    ]
