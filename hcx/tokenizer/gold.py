"""Sentences whose Korean morphemes people marked, and how well token boundaries meet them.

Only places inside a space-separated word count: that a word begins where a space ends is no merit of a tokenizer.
Where a contraction hides the place of a boundary (ha + eoss -> haess), the whole contraction is left out of judgement.
"""

from __future__ import annotations

import itertools
import json
import lzma
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hcx.errors import DataError
from hcx.tokenizer.morphemes import HANGUL, Analyser, cuts


@dataclass(frozen=True)
class GoldSentence:
    """A sentence with its boundaries; places are offsets into its UTF-8 form.

    Attributes:
        text: as written.
        boundaries: where a morpheme ends and another begins.
        judged: the places that are decided on, boundaries among them; those in the middle of a character as well.
    """

    text: str
    boundaries: frozenset[int]
    judged: frozenset[int]


@dataclass(frozen=True)
class BoundaryScore:
    """Token boundaries against morpheme boundaries, summed over sentences.

    Attributes:
        precision: of the token boundaries inside words, the share that are morpheme boundaries.
        recall: of the morpheme boundaries inside words, the share where a token ends.
        f1: their harmonic mean.
        boundaries: morpheme boundaries that were judged.
    """

    precision: float
    recall: float
    f1: float
    boundaries: int


def score_boundaries(pieces_of: Callable[[str], Sequence[bytes]], sentences: Iterable[GoldSentence]) -> BoundaryScore:
    """Scores a tokenizer.

    Args:
        pieces_of: the tokens of a text, as bytes.
        sentences: what to score on.

    Raises:
        DataError: no boundary is judged, or the tokens are not the text.
    """
    hits = guesses = total = 0
    for sentence in sentences:
        pieces = pieces_of(sentence.text)
        if b"".join(pieces) != sentence.text.encode():
            raise DataError(f"the tokens of {sentence.text!r} are not the text; boundaries cannot be compared")
        ends = set(itertools.accumulate(map(len, pieces))) & sentence.judged
        hits += len(ends & sentence.boundaries)
        guesses += len(ends)
        total += len(sentence.boundaries)
    if not total:
        raise DataError("no morpheme boundary in the sentences; nothing to score")
    precision = hits / guesses if guesses else 0.0
    recall = hits / total
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return BoundaryScore(precision, recall, f1, total)


def gold_sentence(text: str, words: Iterable[tuple[str, Sequence[str]]]) -> GoldSentence | None:
    """A sentence from its words in order, each with its morphemes; None if the words are not those of the text.

    A word that has no space before it (a full stop in the Kaist treebank) is bounded as a morpheme is.
    """
    boundaries: set[int] = set()
    hidden: set[int] = set()
    place = 0
    for form, morphemes in words:
        start = text.find(form, place)
        if start < 0 or text[place:start].strip():
            return None
        boundaries.add(start)
        found, unknown = align(form, morphemes)
        boundaries.update(start + offset for offset in found)
        # A place at the very edge of a contraction is hidden with it.
        for first, last in unknown:
            hidden.update(range(start + first, start + last + 1))
        place = start + len(form)
    judged = {n for n in range(1, len(text)) if not text[n - 1].isspace() and not text[n].isspace()}
    if text[place:].strip():
        return None
    return _in_bytes(text, boundaries & judged - hidden, judged - hidden, hidden)


def align(form: str, morphemes: Sequence[str]) -> tuple[set[int], list[tuple[int, int]]]:
    """Where the morphemes of a word lie in its written form.

    Morphemes are matched from both ends as long as they are written as they are. What remains in the middle is a
    contraction; its edge counts as known when the letter next to it stayed (haksaeng + i + bnida -> haksaeng|ibnida).

    Returns:
        Boundaries inside the word, and (first, last) places of what cannot be told.
    """
    head = 0
    place = 0
    while head < len(morphemes) and form.startswith(morphemes[head], place):
        place += len(morphemes[head])
        head += 1
    if head == len(morphemes) and place == len(form):
        return set(itertools.accumulate(map(len, morphemes[:-1]))), []
    tail = len(morphemes)
    end = len(form)
    while tail > head and end > place and form.endswith(morphemes[tail - 1], place, end):
        end -= len(morphemes[tail - 1])
        tail -= 1
    found = set(itertools.accumulate(map(len, morphemes[:head])))
    found |= {len(form) - size for size in itertools.accumulate(map(len, reversed(morphemes[tail:])))}
    first, last = place, end
    middle = morphemes[head:tail]
    if middle and first < last:
        # The places strictly between stay hidden; an edge is known when the letter beside it is unchanged.
        written, expected = _letters(form[first])[:2], _letters(middle[0])[:2]
        # A silent onset (U+110B) begins any vowel, so it takes the vowel as well (ga + ayo -> gayo tells nothing).
        if written == expected or (written[0] == expected[0] and written[0] != "\u110b"):
            first += 1
        if _letters(form[last - 1])[-1:] == _letters(middle[-1])[-1:]:
            last -= 1
    hidden = [(first, last)] if first <= last else []
    return {n for n in found if 0 < n < len(form) and not any(a <= n <= b for a, b in hidden)}, hidden


def _letters(text: str) -> str:
    """A syllable as its conjoining jamo."""
    return unicodedata.normalize("NFD", text)


def _in_bytes(text: str, boundaries: set[int], judged: set[int], hidden: set[int]) -> GoldSentence:
    offsets = [0, *itertools.accumulate(len(character.encode()) for character in text)]
    inside = {
        place
        for number, (start, end) in enumerate(itertools.pairwise(offsets))
        if not (number in hidden and number + 1 in hidden)
        for place in range(start + 1, end)
    }
    return GoldSentence(
        text, frozenset(offsets[n] for n in boundaries), frozenset(inside | {offsets[n] for n in judged})
    )


def read_kaist(path: Path) -> list[GoldSentence]:
    """The Kaist treebank as JSON lines: `text`, `words: [[form, morphemes joined by +, ...]]`."""
    rows = (json.loads(line) for line in open_lines(path))
    return _kept(gold_sentence(row["text"], ((word[0], word[1].split("+")) for word in row["words"])) for row in rows)


def read_klue(path: Path) -> list[GoldSentence]:
    """KLUE's dependency parsing: a comment with the text, then one word a line with its morphemes in column 3."""

    def sentences() -> Iterator[GoldSentence | None]:
        text: str | None = None
        words: list[tuple[str, list[str]]] = []
        for line in itertools.chain(open_lines(path), [""]):
            columns = line.split("\t")
            if line.startswith("##"):
                text = columns[1] if len(columns) == 2 else None
            elif len(columns) == 6:
                words.append((columns[1], columns[2].split(" ")))
            elif text is not None and words:
                yield gold_sentence(text, words)
                text, words = None, []

    return _kept(sentences())


def analysed(analyser: Analyser, texts: Sequence[str]) -> list[GoldSentence]:
    """Sentences with the boundaries that an analyser sees, at all places between Hangul and anything but a space."""
    found = []
    for text, morphemes in zip(texts, analyser.morphemes(texts), strict=True):
        judged = {
            n
            for n in range(1, len(text))
            if not (text[n - 1].isspace() or text[n].isspace()) and (HANGUL.match(text[n - 1]) or HANGUL.match(text[n]))
        }
        found.append(_in_bytes(text, set(cuts(text, morphemes, "fine")), judged, set()))
    return found


def _kept(sentences: Iterable[GoldSentence | None]) -> list[GoldSentence]:
    return [sentence for sentence in sentences if sentence is not None]


def open_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, packed with xz or not.

    Raises:
        DataError: it cannot be read.
    """
    try:
        opener = lzma.open if path.suffix == ".xz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield line.rstrip("\n")
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise DataError(f"{path}: not readable UTF-8 text: {error}") from None
