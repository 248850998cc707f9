"""What the verbs print with: text, tables and JSON on standard output."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

T = TypeVar("T")


def echo(text: str = "") -> None:
    """Prints one line as it is."""
    print(text)


def print_json(value: Any) -> None:
    """Prints a value for scripts."""
    print(json.dumps(value, ensure_ascii=False, indent=1))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table; columns after the first are right-aligned."""
    view = Table(title=title or None, title_justify="left")
    for number, column in enumerate(columns):
        # Folded where it is narrow: a cell that is cut shows less than was measured.
        view.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        view.add_row(*(str(cell) for cell in row))
    Console(highlight=False).print(view)


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows; a new file gets a header.

    A file with other columns, from another version or command, is written anew with all of them; what a row does not
    have stays empty. Measurements take hours: neither the old rows nor the new ones are lost.
    """
    from hcx.artifacts.durable import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    before: list[dict[str, Any]] = []
    columns = list(rows[0])
    if path.exists() and path.stat().st_size:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if list(reader.fieldnames or ()) == columns:
                with open(path, "a", newline="", encoding="utf-8") as end:
                    csv.DictWriter(end, fieldnames=columns).writerows(rows)
                return
            before = list(reader)
            columns = list(dict.fromkeys([*columns, *(reader.fieldnames or ())]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns)
    writer.writeheader()
    writer.writerows([*before, *rows])
    write_atomically(path, text.getvalue().encode())


def keep_rows(rows: Iterable[T], out: Path | None, as_row: Callable[[T], Mapping[str, Any]]) -> list[T]:
    """All rows, each appended to a CSV file, if one is named, when it is known: what was measured stays when a long run
    is stopped.

    Args:
        rows: as they are measured.
        out: the file.
        as_row: what a row is in the file.
    """
    kept = []
    for row in rows:
        kept.append(row)
        if out is not None:
            append_csv(out, [as_row(row)])
    return kept


def write_rows(rows: Sequence[Mapping[str, Any]], out: Path | None, as_json: bool) -> bool:
    """Appends measured rows to a CSV file, if one is named, and prints them as JSON, if that is asked for.

    Returns:
        Whether a table is still to be printed.
    """
    if out is not None:
        append_csv(out, rows)
    if as_json:
        print_json(rows)
    return not as_json
