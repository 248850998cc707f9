"""Reads the documents of a recipe's sources."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from hcx.data.code import code_files, read_code
from hcx.data.columns import datasets_rows, parquet_rows
from hcx.data.document import TEST, Document
from hcx.data.files import UNREADABLE, files_of, json_lines, open_text
from hcx.data.recipe import (
    CodeSource,
    DatasetsSource,
    EmbeddedSource,
    JsonlSource,
    MegatronSource,
    ParquetSource,
    Source,
    StdlibSource,
    TableSource,
    TextSource,
)
from hcx.data.roles import BY_ROW, DEV, training_role
from hcx.data.rows import row_documents, table_rows
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
        DataError: a file is missing, not UTF-8, not what the kind says, or for evaluation only.
    """
    match source:
        case EmbeddedSource():
            # In the order of their hashes, so that a byte budget takes files of every source.
            documents = iter(sorted(shipped_documents(source.language), key=lambda d: name_fraction(d.name)))
        case StdlibSource():
            documents = _stdlib()
        case JsonlSource() | TableSource() | ParquetSource():
            return _rows(source, folder)
        case DatasetsSource():
            roles = {training_role(path) for path in source_files(source, folder)}
            # The library does not tell which file a row is from, so the strictest role holds for all.
            role = next((known for known in (BY_ROW, DEV) if known in roles), None)
            rows = datasets_rows(source, folder)
            return row_documents(source, rows, f"datasets {source.name}: row", source.name.split("/")[-1], role)
        case TextSource():
            documents = _text(source, folder)
        case CodeSource():
            return read_code(source, folder)
        case MegatronSource():
            documents = _megatron(source, folder)
        case _:
            assert_never(source)
    return (replace(document, upsample=source.upsample) for document in documents)


def source_files(source: Source, folder: Path) -> list[Path]:
    """The files on disk that a source reads, for the ledger; none for shipped text and the standard library."""
    match source:
        case MegatronSource():
            return [folder / f"{source.path}{ending}" for ending in (".bin", ".idx")]
        case JsonlSource() | TableSource() | ParquetSource() | TextSource():
            return files_of(source.path, folder)
        case DatasetsSource():
            return [path for name in source.data_files for path in files_of(name, folder)]
        case CodeSource():
            root = folder / source.path
            return [root / name for name, _ in sorted(code_files(source, root))]
        case _:
            return []


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
            yield Document(text=text, source="stdlib", name=name, licence="PSF-2.0")


def _rows(source: JsonlSource | TableSource | ParquetSource, folder: Path) -> Iterator[Document]:
    for path in files_of(source.path, folder):
        role = training_role(path)
        match source:
            case JsonlSource():
                rows = json_lines(path)
            case TableSource():
                rows = table_rows(source, path)
            case ParquetSource():
                rows = parquet_rows(source, path)
        unit = "row" if isinstance(source, ParquetSource) else "line"
        yield from row_documents(source, rows, f"{path}: {unit}", path.name, role)


def _text(source: TextSource, folder: Path) -> Iterator[Document]:
    for path in files_of(source.path, folder):
        role = training_role(path)
        try:
            with open_text(path) as file:
                text = file.read()
        except UNREADABLE as error:
            raise DataError(f"{path}: not UTF-8 text: {error}") from None
        split = {DEV: "validation", BY_ROW: TEST}.get(role or "")  # a text has no field that says what it is for
        yield Document(text, path.stem, path.name, split)


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
