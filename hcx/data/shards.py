"""Token shards on disk: Megatron's `.bin`/`.idx` pair per language and split, and a manifest.

`LANGUAGE-SPLIT.bin` is all tokens of all documents, one after another; every document ends with the end-of-text
token. `LANGUAGE-SPLIT.idx` is Megatron-LM's index (megatron/core/datasets/indexed_dataset.py), which its own loader
reads. `LANGUAGE-SPLIT.bytes.npy` (int64, one per document) is ours: the UTF-8 length of each document, without which
nobody could state bits per byte. `LANGUAGE-SPLIT.sources.npy` (uint16, one per document) is ours too: which of the
sources listed in the manifest each document is from, so that sources can be up-sampled and their draws counted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcx.artifacts import Manifest, read_manifest
from hcx.artifacts import verify as verify_artifact
from hcx.artifacts.digest import digest_file
from hcx.errors import DataError, HcxError, did_you_mean
from hcx.tokenizer import Tokenizer

SPLITS = ("train", "validation")
TOKENIZER_FOLDER = "tokenizer"

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Megatron's choice: two bytes where ids fit."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def write_megatron(prefix: Path, documents: Iterable[NDArray[Any]], dtype: type[np.generic]) -> NDArray[np.int64]:
    """Writes `prefix.bin` and `prefix.idx`, one sequence per document.

    Returns:
        Tokens per document, `[documents]` int64.
    """
    lengths = []
    with open(f"{prefix}.bin", "wb") as file:
        for document in documents:
            file.write(document.astype(dtype).tobytes())
            lengths.append(len(document))
    sizes = np.asarray(lengths, dtype=np.int64)
    itemsize = np.dtype(dtype).itemsize
    pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) * itemsize if len(sizes) else sizes
    with open(f"{prefix}.idx", "wb") as file:
        file.write(_MAGIC)
        file.write(struct.pack("<QBQQ", 1, _CODES[dtype], len(sizes), len(sizes) + 1))
        file.write(sizes.astype(np.int32).tobytes())
        file.write(pointers.tobytes())
        file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
    return sizes


@dataclass(frozen=True)
class Shard:
    """The documents of one language and split.

    Attributes:
        tokens: `[tokens]`, memory-mapped.
        lengths: `[documents]` int64, tokens of each document (the final end-of-text included).
        document_bytes: `[documents]` int64, UTF-8 bytes of each document; zeros where unknown.
        sources: `[documents]` uint16, the number of each document's source; zeros where unknown.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    document_bytes: NDArray[np.int64]
    sources: NDArray[np.uint16]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """`[documents]`: where each document begins in `tokens`."""
        return np.cumsum(self.lengths) - self.lengths

    def document(self, number: int) -> NDArray[Any]:
        """The tokens of one document."""
        start = int(self.starts[number])
        return self.tokens[start : start + int(self.lengths[number])]

    @property
    def num_documents(self) -> int:
        """How many documents."""
        return len(self.lengths)


def read_megatron(prefix: Path) -> Shard:
    """Reads a `.bin`/`.idx` pair (ours or Megatron's), and `.bytes.npy` and `.sources.npy` beside it if they exist.

    Raises:
        DataError: files are missing or damaged.
    """
    index_path, tokens_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index_path, tokens_path):
        if not path.is_file():
            raise DataError(f"{path}: missing; build the shards again with: hcx data build RECIPE --out DIR")
    index = index_path.read_bytes()
    header = struct.calcsize("<QBQQ")
    if index[: len(_MAGIC)] != _MAGIC or len(index) < len(_MAGIC) + header:
        raise DataError(f"{index_path}: not a Megatron index (its first bytes differ)")
    version, code, sequences, document_entries = struct.unpack_from("<QBQQ", index, len(_MAGIC))
    expected = len(_MAGIC) + header + sequences * 12 + document_entries * 8
    if version != 1 or code not in _DTYPES or len(index) != expected:
        raise DataError(
            f"{index_path}: damaged index (version {version}, type {code}, {len(index)} of {expected} bytes)"
        )
    offset = len(_MAGIC) + header
    sizes = np.frombuffer(index, dtype=np.int32, count=sequences, offset=offset).astype(np.int64)
    pointers = np.frombuffer(index, dtype=np.int64, count=sequences, offset=offset + sequences * 4)
    bounds = np.frombuffer(index, dtype=np.int64, count=document_entries, offset=offset + sequences * 12)
    dtype = _DTYPES[code]
    itemsize = np.dtype(dtype).itemsize
    total = int(sizes.sum())
    if tokens_path.stat().st_size != total * itemsize:
        raise DataError(
            f"{tokens_path}: {tokens_path.stat().st_size} bytes, the index says {total * itemsize}; damaged"
        )
    # A document of Megatron's may be several sequences (sentences); here they need only follow each other.
    if sequences and not np.array_equal(pointers, (np.cumsum(sizes) - sizes) * itemsize):
        raise DataError(f"{index_path}: sequences are not stored one after another; rewrite the shard")
    if sequences and (bounds[0] != 0 or bounds[-1] != sequences or np.any(np.diff(bounds) <= 0)):
        raise DataError(f"{index_path}: damaged document bounds")
    ends = np.concatenate([[0], np.cumsum(sizes)])
    lengths = np.diff(ends[bounds]) if sequences else np.zeros(0, np.int64)
    tokens: NDArray[Any] = np.memmap(tokens_path, dtype=dtype, mode="r") if total else np.zeros(0, dtype)
    return Shard(
        tokens,
        lengths,
        _per_document(prefix, "bytes", np.int64, len(lengths)),
        _per_document(prefix, "sources", np.uint16, len(lengths)),
    )


def _per_document(prefix: Path, name: str, dtype: type[np.generic], documents: int) -> NDArray[Any]:
    path = Path(f"{prefix}.{name}.npy")
    if not path.is_file():
        return np.zeros(documents, dtype)
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: damaged: {error}; build the shards again") from None
    if values.shape != (documents,) or values.dtype != dtype:
        raise DataError(f"{path}: {values.shape} {values.dtype}, the index has {documents} documents")
    return values


class ShardSet:
    """A directory that `hcx data build` made. Open it with `ShardSet.open`."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.digest: str = digest_file(directory / "manifest.json")
        self.eos_id = int(manifest.counts["eos_id"])
        self.vocab_size = int(manifest.counts["vocab_size"])
        self.tokenizer_digest = str(manifest.counts["tokenizer_digest"])
        self._shards: dict[tuple[str, str], Shard] = {}

    @classmethod
    def open(cls, directory: str | Path) -> ShardSet:
        """Opens a shard directory; its content is read when it is needed.

        Raises:
            DataError: not a finished shard directory.
        """
        directory = Path(directory)
        try:
            manifest = read_manifest(directory, kind="shards")
        except HcxError as error:
            raise DataError(f"{error}; build shards with: hcx data build RECIPE --out DIR") from None
        return cls(directory, manifest)

    def verify(self) -> None:
        """Checks every file against the manifest.

        Raises:
            HcxError: naming the first file that is missing or differs.
        """
        verify_artifact(self.directory)

    @property
    def languages(self) -> tuple[str, ...]:
        """The names of the languages, in the recipe's order."""
        return tuple(self.manifest.counts["languages"])

    @property
    def shares(self) -> dict[str, float]:
        """The recipe's shares of training rows; they sum to 1."""
        return dict(self.manifest.counts["shares"])

    def counts(self, language: str) -> dict[str, dict[str, Any]]:
        """Per split: documents, tokens, bytes, sources; and what each stage kept and dropped."""
        return self.manifest.counts["languages"][self._known(language)]

    def shard(self, language: str, split: str) -> Shard:
        """The tokens of a language's split (`train` or `validation`)."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}: {did_you_mean(split, SPLITS)}")
        key = (self._known(language), split)
        if key not in self._shards:
            self._shards[key] = read_megatron(self.directory / f"{language}-{split}")
        return self._shards[key]

    def sources(self, language: str, split: str) -> tuple[str, ...]:
        """The names of a split's sources, by number; the language's own name where the shards do not tell."""
        entries = self.counts(language)[split].get("sources")
        return tuple(entry["name"] for entry in entries) if entries else (language,)

    def factors(self, language: str, split: str, upsample: Mapping[str, float] | None = None) -> NDArray[np.float64]:
        """`[documents]`: how often each document comes in an epoch, by the recipe's factors.

        Args:
            language: which language.
            split: which split.
            upsample: source -> factor, instead of the recipe's.
        """
        shard = self.shard(language, split)
        entries = self.counts(language)[split].get("sources") or [{"name": language, "upsample": 1.0}]
        by_number = [float((upsample or {}).get(entry["name"], entry["upsample"])) for entry in entries]
        return np.asarray(by_number, dtype=np.float64)[shard.sources]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards.

        Raises:
            DataError: its file is not the one the manifest names.
        """
        tokenizer = Tokenizer.load(self.directory / TOKENIZER_FOLDER)
        if tokenizer.digest != self.tokenizer_digest:
            raise DataError(f"{self.directory / TOKENIZER_FOLDER}: not the tokenizer that made these shards")
        return tokenizer

    def _known(self, language: str) -> str:
        if language not in self.languages:
            raise DataError(f"{self.directory}: language {language!r}: {did_you_mean(language, self.languages)}")
        return language
