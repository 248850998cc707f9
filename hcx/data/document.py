"""One text with where it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace

TEST = "test"
"""The split of documents that are for evaluation alone: they go into no shard."""


@dataclass(frozen=True)
class Document:
    """A document before tokenization.

    Attributes:
        text: the content.
        source: the name of the source.
        name: identifies the document's file within the source; whole files go to one split.
        split: `train`, `validation` or `test` where the source decided it, else None.
        licence: of the text, where the source tells.
        upsample: how often it comes in an epoch of its language.
    """

    text: str
    source: str
    name: str
    split: str | None = None
    licence: str | None = None
    upsample: float = 1.0

    def with_text(self, text: str) -> Document:
        """The same document with another text."""
        return replace(self, text=text)
