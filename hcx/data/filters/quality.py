"""Drops documents that are repetitive, symbols rather than text, or noise.

Repetition and symbol rules are those of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1), counted as there: shares
of lines, and of the characters in repeated word n-grams. Its rules about English stop words and word lengths do not
carry over: a Korean word (eojeol) is about three syllables long and holds its particle. So length limits are fields,
and there are rules of Hangul: its share of the letters, and runs of loose Jamo, which chat laughs and cries with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import Field, field_validator

from hcx.config import Config
from hcx.data.extract import hangul_share

_BULLETS = re.compile("^\\s*(?:[-*+\u2022\u25cf\u25aa\u00b7\u25b6\u2023\u203b]|\\d{1,2}[.)])\\s")
_ELLIPSIS = re.compile("(?:\\.\\.\\.|\u2026)\\s*$")
_SYMBOLS = re.compile("#|\\.\\.\\.|\u2026")
_JAMO = re.compile("[\u3131-\u318e]")


class QualityConfig(Config):
    """Limits beyond which a document is dropped; null switches a rule off. The defaults suit prose."""

    max_duplicate_line_share: float | None = 0.3
    """Lines that stood before, per line (blank ones not counted)."""
    max_duplicate_line_character_share: float | None = 0.2
    """Characters in such lines, per character."""
    max_top_ngram_share: dict[int, float] = Field(default_factory=lambda: {2: 0.2, 3: 0.18, 4: 0.16})
    """By n: characters in the most frequent word n-gram, per character; only where it comes at least three times."""
    max_duplicate_ngram_share: dict[int, float] = Field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    )
    """By n: characters in word n-grams that stood before, per character."""
    max_longest_repeat_share: float | None = 0.2
    """Words in the longest passage that stands in the text twice, per word."""
    max_symbol_share: float | None = 0.1
    """Hash signs and ellipses, per word."""
    max_bullet_line_share: float | None = 0.9
    """Lines that begin with a bullet or a number, per line."""
    max_ellipsis_line_share: float | None = 0.3
    """Lines that end in an ellipsis, per line."""
    mean_word_characters: tuple[float, float] | None = None
    """Smallest and largest mean length of words; Gopher: 3 to 10 for English; for Korean about 1.5 to 8."""
    max_word_characters: int | None = None
    """A longer word is one without spaces ..."""
    max_long_word_share: float = 0.1
    """... of which there may be so many, per word."""
    min_hangul_share: float | None = None
    """Hangul syllables per letter (Latin or Hangul): for Korean text."""
    max_jamo_share: float | None = None
    """Loose Jamo per character that is not white space: laughter, tears, initials."""
    max_character_run: int | None = None
    """Longest run of one character, other than white space and the marks that rules are drawn with."""
    blocked_words: tuple[str, ...] = ()
    """Parts of words, in lower case, of hate speech or advertising; a word that holds one counts as blocked."""
    max_blocked_word_share: float = 0.02
    """Blocked words, per word."""

    @field_validator("blocked_words")
    @classmethod
    def _not_empty(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if any(not word.strip() or word != word.lower() for word in words):
            raise ValueError("words must not be empty, and in lower case")
        return words


def quality_reason(text: str, config: QualityConfig) -> str | None:
    """The first rule that a text breaks, in a fixed order; None if it breaks none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = text.split()
    if not words:
        return "no_words"
    return (
        _lines_reason(lines, config)
        or _words_reason(text, words, config)
        or _characters_reason(text, config)
        or _repetition_reason(words, config)
    )


def _above(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _lines_reason(lines: Sequence[str], config: QualityConfig) -> str | None:
    seen: set[str] = set()
    repeated = repeated_characters = 0
    for line in lines:
        if line in seen:
            repeated += 1
            repeated_characters += len(line)
        seen.add(line)
    if _above(repeated / len(lines), config.max_duplicate_line_share):
        return "duplicate_lines"
    if _above(repeated_characters / sum(map(len, lines)), config.max_duplicate_line_character_share):
        return "duplicate_line_characters"
    if _above(sum(bool(_BULLETS.match(line)) for line in lines) / len(lines), config.max_bullet_line_share):
        return "bullets"
    if _above(sum(bool(_ELLIPSIS.search(line)) for line in lines) / len(lines), config.max_ellipsis_line_share):
        return "ellipses"
    return None


def _words_reason(text: str, words: Sequence[str], config: QualityConfig) -> str | None:
    if _above(len(_SYMBOLS.findall(text)) / len(words), config.max_symbol_share):
        return "symbols"
    if config.mean_word_characters is not None:
        low, high = config.mean_word_characters
        if not low <= sum(map(len, words)) / len(words) <= high:
            return "word_length"
    if config.max_word_characters is not None:
        long = sum(len(word) > config.max_word_characters for word in words)
        if long / len(words) > config.max_long_word_share:
            return "long_words"
    if config.blocked_words:
        blocked = sum(any(part in word for part in config.blocked_words) for word in text.lower().split())
        if blocked / len(words) > config.max_blocked_word_share:
            return "blocked_words"
    return None


def _characters_reason(text: str, config: QualityConfig) -> str | None:
    if config.min_hangul_share is not None and hangul_share(text) < config.min_hangul_share:
        return "hangul_share"
    if config.max_jamo_share is not None:
        solid = len("".join(text.split()))
        if len(_JAMO.findall(text)) / solid > config.max_jamo_share:
            return "jamo_noise"
    if config.max_character_run is not None and re.search(rf"([^\s\-=_*~.#])\1{{{config.max_character_run},}}", text):
        return "character_run"
    return None


def _repetition_reason(words: Sequence[str], config: QualityConfig) -> str | None:
    lengths = np.asarray([len(word) for word in words], np.int64)
    # One number per word: n-grams are then compared without joining strings.
    numbers: dict[str, int] = {}
    ids = np.asarray([numbers.setdefault(word, len(numbers)) for word in words], np.int64)
    for n, limit in sorted(config.max_top_ngram_share.items()):
        if top_ngram_share(ids, lengths, n) > limit:
            return "top_ngram"
    for n, limit in sorted(config.max_duplicate_ngram_share.items()):
        if duplicate_ngram_share(ids, lengths, n) > limit:
            return "duplicate_ngrams"
    if config.max_longest_repeat_share is not None and longest_repeat(ids) > config.max_longest_repeat_share * len(
        words
    ):
        return "longest_repeat"
    return None


def _ngrams(ids: np.ndarray, n: int) -> list[bytes]:
    data, size = ids.tobytes(), ids.itemsize
    return [data[start * size : (start + n) * size] for start in range(len(ids) - n + 1)]


def top_ngram_share(ids: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Characters in the most frequent n-gram of words, per character of words.

    Args:
        ids: `[words]`, equal where words are.
        lengths: `[words]`, characters of each.
        n: words per n-gram.
    """
    grams = _ngrams(ids, n)
    if not grams:
        return 0.0
    gram, count = max(Counter(grams).items(), key=lambda item: item[1])
    if count < 3:
        # In a short text any two words that come twice are a large share of it.
        return 0.0
    start = grams.index(gram)
    return count * int(lengths[start : start + n].sum()) / int(lengths.sum())


def duplicate_ngram_share(ids: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Characters of words inside n-grams that stood before, each counted once, per character of words.

    Args:
        ids: `[words]`, equal where words are.
        lengths: `[words]`, characters of each.
        n: words per n-gram.
    """
    seen: set[bytes] = set()
    inside = np.zeros(len(ids), dtype=bool)
    for start, gram in enumerate(_ngrams(ids, n)):
        if gram in seen:
            inside[start : start + n] = True
        seen.add(gram)
    return int(lengths[inside].sum()) / int(lengths.sum()) if len(ids) else 0.0


def longest_repeat(ids: np.ndarray) -> int:
    """Words in the longest passage that occurs twice (the two may overlap): if one of n does, so does one of n - 1."""
    low, high = 0, max(len(ids) - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        grams = _ngrams(ids, middle)
        if len(set(grams)) < len(grams):
            low = middle
        else:
            high = middle - 1
    return low
