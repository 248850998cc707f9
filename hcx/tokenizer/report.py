"""How compactly tokenizers write texts: bytes per token, per file, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hcx.errors import DataError
from hcx.tokenizer.codec import TOKENIZER_JSON, Tokenizer


@dataclass(frozen=True)
class ReportRow:
    """One tokenizer on one text.

    Attributes:
        tokenizer: the directory.
        vocab_size: number of ids.
        text: the file.
        num_bytes: UTF-8 bytes of the text.
        tokens: ids it took.
        bytes_per_token: higher is more compact.
        characters_per_token: the same in characters; a Hangul syllable is one character and three bytes.
        lossless: whether decoding gives the text back.
    """

    tokenizer: str
    vocab_size: int
    text: str
    num_bytes: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float
    lossless: bool

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def tokenizer_report(tokenizers: Sequence[str | Path], texts: Sequence[tuple[str, str]]) -> list[ReportRow]:
    """Encodes every text with every tokenizer.

    Args:
        tokenizers: directories with a `tokenizer.json`.
        texts: (name, content).

    Raises:
        DataError: a tokenizer cannot be read, or a text is empty.
    """
    rows = []
    for directory in tokenizers:
        path = Path(directory)
        tokenizer = Tokenizer.load(path.parent if path.name == TOKENIZER_JSON else path)
        for name, content in texts:
            if not content:
                raise DataError(f"{name}: empty text; nothing to measure")
            ids = tokenizer.encode(content)
            num_bytes = len(content.encode())
            rows.append(
                ReportRow(
                    tokenizer=str(directory),
                    vocab_size=tokenizer.vocab_size,
                    text=name,
                    num_bytes=num_bytes,
                    tokens=len(ids),
                    bytes_per_token=num_bytes / len(ids),
                    characters_per_token=len(content) / len(ids),
                    lossless=tokenizer.decode(ids, skip_special=False) == content,
                )
            )
    return rows
