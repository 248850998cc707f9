"""Reads the documents of a recipe's sources."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import IO, assert_never

from hcx.data.document import Document
from hcx.data.recipe import EmbeddedSource, JsonlSource, MegatronSource, Source, StdlibSource, TextSource
from hcx.data.shards import read_megatron
from hcx.data.shipped import name_fraction, shipped_documents
from hcx.errors import DataError
from hcx.tokenizer import Tokenizer

_STDLIB_LEFT_OUT = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "lib2to3",
        "idlelib",
        "turtledemo",
        "ensurepip",
        "encodings",  # tables, not code
        "pydoc_data",
        "config",
    }
)
_STDLIB_SIZES = range(500, 40_000)
"""Characters per file: shorter ones are stubs, longer ones would fill the budget alone."""


def read_source(source: Source, folder: Path) -> Iterator[Document]:
    """The documents of a source in a fixed order.

    Args:
        source: what to read.
        folder: what relative paths are relative to.

    Raises:
        DataError: a file is missing, not UTF-8, or not what the kind says.
    """
    match source:
        case EmbeddedSource():
            # In the order of their hashes, so that a byte budget takes files of every source.
            documents = iter(sorted(shipped_documents(source.language), key=lambda d: name_fraction(d.name)))
        case StdlibSource():
            documents = _stdlib()
        case JsonlSource():
            documents = _jsonl(source, folder)
        case TextSource():
            documents = _text(source, folder)
        case MegatronSource():
            documents = _megatron(source, folder)
        case _:
            assert_never(source)
    return documents


def source_files(source: Source, folder: Path) -> list[Path]:
    """The files on disk that a source reads, for the ledger; none for shipped text and the standard library."""
    if isinstance(source, MegatronSource):
        return [folder / f"{source.path}{ending}" for ending in (".bin", ".idx")]
    return _files(source.path, folder) if isinstance(source, (JsonlSource, TextSource)) else []


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        parts = name.split("/")
        if not (_STDLIB_LEFT_OUT & set(parts[:-1])) and not any(part.startswith("config-") for part in parts):
            names.append(name)
    # In the order of their hashes, so that a byte budget takes files from everywhere.
    for name in sorted(names, key=lambda name: (name_fraction(name), name)):
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if len(text) in _STDLIB_SIZES:
            yield Document(text=text, source="stdlib", name=name)


def _files(pattern: str, folder: Path) -> list[Path]:
    found = sorted(Path(path) for path in glob.glob(str(folder / pattern), recursive=True) if Path(path).is_file())
    if not found:
        raise DataError(f"{folder / pattern}: no such file, and no file matches the pattern")
    return found


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _jsonl(source: JsonlSource, folder: Path) -> Iterator[Document]:
    for path in _files(source.path, folder):
        number = 0
        try:
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    text = row.get(source.field) if isinstance(row, dict) else None
                    if not isinstance(text, str):
                        raise DataError(
                            f"{path}: line {number}: no text under the key {source.field!r}; set the source's `field`"
                        )
                    split = row.get("split")
                    name = row.get("file") if isinstance(row.get("file"), str) else f"{path.name}:{number}"
                    yield Document(
                        text=text,
                        source=str(row.get("source", path.stem)),
                        name=name,
                        split=split if split in ("train", "validation") else None,
                    )
        except (UnicodeDecodeError, json.JSONDecodeError, OSError, lzma.LZMAError, EOFError) as error:
            raise DataError(f"{path}: line {number + 1}: not JSON lines in UTF-8: {error}") from None


def _text(source: TextSource, folder: Path) -> Iterator[Document]:
    for path in _files(source.path, folder):
        try:
            with _open(path) as file:
                text = file.read()
        except (UnicodeDecodeError, OSError, lzma.LZMAError, EOFError) as error:
            raise DataError(f"{path}: not UTF-8 text: {error}") from None
        yield Document(text=text, source=path.stem, name=path.name)


def _megatron(source: MegatronSource, folder: Path) -> Iterator[Document]:
    prefix = folder / source.path
    shard = read_megatron(prefix)
    tokenizer = Tokenizer.load(folder / source.tokenizer)
    if len(shard.tokens) and int(shard.tokens.max()) >= tokenizer.vocab_size:
        raise DataError(
            f"{prefix}.bin: holds id {int(shard.tokens.max())}, the tokenizer {folder / source.tokenizer} has "
            f"{tokenizer.vocab_size}; name the tokenizer that made it"
        )
    for number in range(shard.num_documents):
        text = tokenizer.decode(shard.document(number).tolist(), skip_special=True)
        yield Document(text=text, source=prefix.name, name=f"{prefix.name}:{number}")
