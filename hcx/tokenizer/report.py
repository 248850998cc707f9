"""How compactly tokenizers write texts, and where their tokens end in Korean words, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hcx.errors import DataError
from hcx.tokenizer.gold import GoldSentence, score_boundaries
from hcx.tokenizer.peers import Measured, load_measured


@dataclass(frozen=True)
class Text:
    """A text to measure on.

    Attributes:
        name: how tables call it.
        content: the text.
        domain: `in` for held-out text of the kind that ships with hcx, `out` for other kinds, `-` where nobody said.
    """

    name: str
    content: str
    domain: str = "-"


@dataclass(frozen=True)
class ReportRow:
    """One tokenizer on one text.

    Attributes:
        tokenizer: its name.
        vocab_size: number of ids.
        text: the text's name.
        domain: of the text, as in `Text`.
        num_bytes: UTF-8 bytes of the text.
        tokens: ids it took.
        bytes_per_token: higher is more compact.
        characters_per_token: the same in characters; a Hangul syllable is one character and three bytes.
        tokens_per_syllable: tokens with a part of a Hangul syllable, by Hangul syllables; None without Hangul.
        lossless: whether the tokens are the bytes of the text.
    """

    tokenizer: str
    vocab_size: int
    text: str
    domain: str
    num_bytes: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float
    tokens_per_syllable: float | None
    lossless: bool

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class BoundaryRow:
    """One tokenizer against the morphemes of one set of sentences.

    Attributes:
        tokenizer: its name.
        vocab_size: number of ids.
        judge: who marked the morphemes.
        precision, recall, f1: as in `hcx.tokenizer.gold.BoundaryScore`; None with a `reason`.
        boundaries: morpheme boundaries that were judged.
        reason: why nothing could be scored.
    """

    tokenizer: str
    vocab_size: int
    judge: str
    precision: float | None
    recall: float | None
    f1: float | None
    boundaries: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def tokenizer_report(
    tokenizers: Sequence[str | Path | Measured], texts: Sequence[Text | tuple[str, str]]
) -> list[ReportRow]:
    """Encodes every text with every tokenizer.

    Args:
        tokenizers: what `load_measured` reads, or has read.
        texts: texts, or (name, content).

    Raises:
        DataError: a tokenizer cannot be read, or a text is empty.
    """
    measured = [entry if isinstance(entry, Measured) else load_measured(entry) for entry in tokenizers]
    wanted = [entry if isinstance(entry, Text) else Text(*entry) for entry in texts]
    for text in wanted:
        if not text.content:
            raise DataError(f"{text.name}: empty text; nothing to measure")
    return [_row(tokenizer, text) for tokenizer in measured for text in wanted]


def boundary_report(tokenizers: Sequence[Measured], judges: Mapping[str, Sequence[GoldSentence]]) -> list[BoundaryRow]:
    """Scores every tokenizer against every judge.

    Args:
        tokenizers: what `load_measured` has read.
        judges: name -> sentences with their boundaries.
    """
    rows = []
    for tokenizer in tokenizers:
        for judge, sentences in judges.items():
            try:
                score = score_boundaries(tokenizer.pieces, sentences)
            except DataError as error:
                rows.append(BoundaryRow(tokenizer.name, tokenizer.vocab_size, judge, None, None, None, 0, str(error)))
                continue
            rows.append(
                BoundaryRow(
                    tokenizer.name,
                    tokenizer.vocab_size,
                    judge,
                    score.precision,
                    score.recall,
                    score.f1,
                    score.boundaries,
                )
            )
    return rows


def _row(tokenizer: Measured, text: Text) -> ReportRow:
    pieces = tokenizer.pieces(text.content)
    content = text.content.encode()
    return ReportRow(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        text=text.name,
        domain=text.domain,
        num_bytes=len(content),
        tokens=len(pieces),
        bytes_per_token=len(content) / len(pieces),
        characters_per_token=len(text.content) / len(pieces),
        tokens_per_syllable=_tokens_per_syllable(text.content, pieces),
        lossless=b"".join(pieces) == content,
    )


def _tokens_per_syllable(text: str, pieces: Sequence[bytes]) -> float | None:
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    is_syllable = (points >= 0xAC00) & (points <= 0xD7A3)
    if not is_syllable.any():
        return None
    num_bytes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(np.repeat(is_syllable, num_bytes))])
    # A tokenizer that changes text may write more bytes than there are; what lies beyond holds no syllable.
    ends = np.minimum(np.cumsum([len(piece) for piece in pieces]), len(before) - 1)
    starts = np.concatenate([[0], ends[:-1]])
    return float(np.count_nonzero(before[ends] > before[starts]) / np.count_nonzero(is_syllable))
