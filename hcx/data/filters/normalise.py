"""One spelling for text that looks the same: Unicode form, control characters, line ends, white space.

It belongs to the data pipeline alone. The tokenizer never normalises: it must give every byte back.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from pydantic import Field

from hcx.config import Config

_LINE_ENDS = re.compile("\r\n|[\r\u0085\u2028\u2029]")
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff]")
"""Control characters but tab and line feed; soft hyphen, zero-width space, word joiner and byte order mark. The
zero-width joiner stays: emoji are made with it."""
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_RUN_OF_SPACES = re.compile(r"[ \t]{2,}|\t")
_BLANK_LINES = re.compile(r"\n{4,}")
_OUTER_LINES = re.compile(r"\A\n+|\s+\Z")


class NormaliseConfig(Config):
    """Which differences of spelling are taken out of the text."""

    unicode: Literal["nfc", "none"] = "nfc"
    """Canonical composition, so that Hangul typed as Jamo (as macOS stores file names) is the same syllables; or
    leave as it is."""
    invisible: bool = True
    """Take out control characters (but tab and line feed) and invisible ones that mean nothing."""
    line_ends: bool = True
    """Every line end becomes one line feed."""
    spaces: Literal["keep", "trailing", "collapse"] = "trailing"
    """`trailing` makes Unicode's other spaces plain ones, takes white space off the ends of lines and of the text,
    and leaves at most two blank lines; `collapse` makes one space of every run too, which ruins code."""
    longest_run: int | None = Field(default=None, ge=2)
    """Shorten runs of one Hangul Jamo (laughter and tears in chat) to so many; null: leave them."""


def normalise(text: str, config: NormaliseConfig) -> str:
    """The text in its one spelling; doing it again changes nothing."""
    if config.line_ends:
        text = _LINE_ENDS.sub("\n", text)
    if config.invisible:
        text = _INVISIBLE.sub("", text)
    if config.longest_run is not None:
        # Compatibility Jamo: what a keyboard gives outside of a syllable.
        text = re.sub(rf"([\u3131-\u3163])\1{{{config.longest_run},}}", r"\1" * config.longest_run, text)
    if config.spaces != "keep":
        text = _SPACES.sub(" ", text)
        if config.spaces == "collapse":
            text = _RUN_OF_SPACES.sub(" ", text)
        text = _OUTER_LINES.sub("", _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", text)))
    # Last: taking out what stood between a letter and its mark lets them compose.
    return unicodedata.normalize("NFC", text) if config.unicode == "nfc" else text
