"""Exact de-duplication, and keeping training text apart from held-out text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from hcx.data.document import Document


def content_key(text: str) -> bytes:
    """Equal for texts that differ only in white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


class Deduplicator:
    """Keeps the first of equal documents, over everything it is shown.

    Show it the held-out documents first: then a text that is in both splits is held out, and training never sees it.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self.duplicates = 0

    def keep(self, documents: Iterable[Document]) -> list[Document]:
        """The documents not seen before, in order; counts the others in `duplicates`."""
        kept = []
        for document in documents:
            key = content_key(document.text)
            if key in self._seen:
                self.duplicates += 1
            else:
                self._seen.add(key)
                kept.append(document)
        return kept
