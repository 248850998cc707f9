"""What the verbs print with: text, tables and JSON on standard output."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


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
        view.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        view.add_row(*(str(cell) for cell in row))
    Console(highlight=False).print(view)


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows; a new file gets a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
