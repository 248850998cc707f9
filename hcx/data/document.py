"""One text with where it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A document before tokenization.

    Attributes:
        text: the content.
        source: the name of the source.
        name: identifies the document's file within the source; whole files go to one split.
        split: `train` or `validation` where the source decided it, else None.
    """

    text: str
    source: str
    name: str
    split: str | None = None
