"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., chapter 3).

The work is the library `datasketch`'s, of which this module is the one door. Two texts are near-duplicates when the
Jaccard similarity of their shingles, as their signatures estimate it, reaches the threshold.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from hcx.config import Config
from hcx.data.document import Document
from hcx.errors import MissingExtra

if TYPE_CHECKING:
    from datasketch import MinHash

_WORD = re.compile(r"\w+")


class NearDuplicateConfig(Config):
    """What counts as nearly the same text."""

    threshold: float = Field(default=0.8, gt=0, lt=1)
    """Share of common shingles (Jaccard) from which a later document is left out."""
    permutations: int = Field(default=128, ge=16)
    """Length of a signature; the estimate's standard deviation is at most half over its square root."""
    shingles: Literal["characters", "words"] = "characters"
    """Of characters, white space left out: suits Korean, whose spacing varies and whose words change with their
    particles. Of words: faster, for English."""
    shingle_size: int = Field(default=8, ge=2)
    """Characters or words per shingle; 5 words are usual."""


def shingles(text: str, config: NearDuplicateConfig) -> set[str]:
    """The shingles of a text in lower case; a text shorter than one shingle is one itself."""
    size = config.shingle_size
    if config.shingles == "words":
        words = _WORD.findall(text.lower())
        return {" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1))}
    solid = "".join(text.lower().split())
    return {solid[start : start + size] for start in range(max(1, len(solid) - size + 1))}


class NearDeduplicator:
    """Keeps the first of nearly equal documents, over everything it is shown, in the order in which it is shown.

    Show it the held-out documents first: then no training document is nearly one of them.

    Raises:
        MissingExtra: `datasketch` is not installed.
    """

    def __init__(self, config: NearDuplicateConfig) -> None:
        try:
            import datasketch
        except ImportError:
            raise MissingExtra("datasketch", "text", "near de-duplication") from None
        self._config = config
        self._library: Any = datasketch
        self._index = datasketch.MinHashLSH(threshold=config.threshold, num_perm=config.permutations)
        self._signatures: list[MinHash] = []

    def keep(self, documents: Iterable[Document]) -> list[Document]:
        """The documents that are not near to one seen before, in order."""
        return [document for document in documents if self._is_new(document.text)]

    def _is_new(self, text: str) -> bool:
        signature = self._library.MinHash(num_perm=self._config.permutations, seed=1, hashfunc=_hash)
        # One order for the set: the signature does not depend on it, the time of two runs does.
        signature.update_batch(sorted(shingles(text, self._config)))
        near = self._index.query(signature)
        if any(self._signatures[key].jaccard(signature) >= self._config.threshold for key in near):
            return False
        self._index.insert(len(self._signatures), signature)
        self._signatures.append(signature)
        return True


def _hash(shingle: str) -> int:
    # 32 bits as the library wants them; the same in every process, and far faster than its SHA-1.
    return int(np.uint32(zlib.crc32(shingle.encode("utf-8", "surrogatepass"))))
