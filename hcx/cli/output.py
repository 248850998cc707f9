"""What the verbs print with: text, tables and JSON on standard output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
