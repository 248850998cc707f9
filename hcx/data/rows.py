"""Rows with named fields as documents."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hcx.data.document import TEST, Document
from hcx.data.files import UNREADABLE, open_text
from hcx.data.roles import BY_ROW, DEV, Role
from hcx.data.source_config import RowSource, TableSource
from hcx.errors import DataError

_SPLITS = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation")}
_MAX_CELL = 1 << 27
"""Characters of a cell in a CSV file; the module's own limit is 128 kB."""

Rows = Iterable[tuple[int, dict[str, Any]]]


def row_documents(source: RowSource, rows: Rows, where: str, name: str, role: Role = None) -> Iterator[Document]:
    """The documents of a source's rows.

    Args:
        source: which fields mean what.
        rows: (number, row).
        where: the file and what its numbers count, for errors: `a.jsonl: line`.
        name: names rows without a name of their own.
        role: what the file's collection says that it is for.

    Raises:
        DataError: a row without the text.
    """
    group: list[str] = []
    head: Document | None = None
    key: Any = None
    for number, row in rows:
        if any(row.get(field) != value for field, value in source.where.items()):
            continue
        document = _document(source, row, number, where, name, role)
        if source.group_by is None:
            yield document
            continue
        if source.group_by not in row:
            raise DataError(f"{where} {number}: no key {source.group_by!r} to group by; set `group_by`")
        size = sum(map(len, group)) + len(group) + len(document.text)
        fits = head is not None and row[source.group_by] == key and size <= source.group_characters
        if head is not None and (not fits or document.split != head.split):
            yield head.with_text("\n".join(group))
            head, group = None, []
        if head is None:
            # All documents of one group are one file: they stay on one side of the split.
            head = _named(document, f"{name}:{row[source.group_by]}")
        key = row[source.group_by]
        group.append(document.text)
    if head is not None:
        yield head.with_text("\n".join(group))


def _named(document: Document, name: str) -> Document:
    return Document(document.text, document.source, name, document.split, document.licence, document.upsample)


def _document(source: RowSource, row: dict[str, Any], number: int, where: str, name: str, role: Role) -> Document:
    fields = (source.field,) if isinstance(source.field, str) else source.field
    texts = []
    for field in fields:
        text = row.get(field)
        if not isinstance(text, str):
            raise DataError(
                f"{where} {number}: no text under the key {field!r}; set the source's `field` "
                f"to one of {', '.join(sorted(map(str, row)))}"
            )
        texts.append(text)
    value = row.get(source.split_field) if source.split_field is not None else None
    split = None if value is None else _SPLITS.get(str(value), TEST)
    if role == BY_ROW and split is None:
        split = TEST
    elif role == DEV:
        split = "validation"
    own = row.get(source.name_field)
    origin, licence = row.get("source"), row.get("licence")
    return Document(
        text="\n".join(texts),
        source=origin if isinstance(origin, str) else name.split(".")[0],
        name=own if isinstance(own, str) else f"{name}:{number}",
        split=split,
        licence=licence if isinstance(licence, str) else source.licence,
        upsample=source.upsample,
    )


def table_rows(source: TableSource, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a table with headings.

    Raises:
        DataError: a line has another number of cells than the headings, or the file is not UTF-8.
    """
    number = 0
    try:
        with open_text(path) as file:
            if source.dialect == "csv":
                csv.field_size_limit(_MAX_CELL)
                lines: Iterable[list[str]] = csv.reader(file, strict=True)
            else:
                lines = (line.rstrip("\n").split("\t") for line in file)
            headings: list[str] | None = None
            for number, cells in enumerate(lines, 1):
                if headings is None:
                    headings = [heading.strip() for heading in cells]
                    continue
                if len(cells) != len(headings):
                    raise DataError(
                        f"{path}: line {number}: {len(cells)} cells, the headings are {len(headings)} "
                        f"({', '.join(headings)}); check the `dialect`"
                    )
                yield number, dict(zip(headings, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: line {number + 1}: not CSV: {error}; check the `dialect`") from None
    except UNREADABLE as error:
        raise DataError(f"{path}: line {number + 1}: not a table in UTF-8: {error}") from None
