"""Finding and opening the files of sources: glob patterns, compression, JSON lines, with errors that name the place."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hcx.errors import DataError

UNREADABLE = (UnicodeDecodeError, OSError, lzma.LZMAError, zlib.error, EOFError)
"""What opening or decoding a damaged file raises."""


def files_of(pattern: str, folder: Path) -> list[Path]:
    """The files that a pattern matches, in the order of their names.

    Raises:
        DataError: there is none.
    """
    found = sorted(Path(path) for path in glob.glob(str(folder / pattern), recursive=True) if Path(path).is_file())
    if not found:
        raise DataError(f"{folder / pattern}: no such file, and no file matches the pattern")
    return found


def open_text(path: Path) -> IO[str]:
    """A file as UTF-8 text; `.gz` and `.xz` are unpacked."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank.

    Raises:
        DataError: naming the line that is not a JSON object in UTF-8: cut short, damaged, or of another kind.
    """
    number = 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    cut = "" if line.endswith("\n") else " (the file ends inside it: was its writing interrupted?)"
                    raise DataError(f"{path}: line {number}: not JSON lines: {error}{cut}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}: line {number}: not a JSON object but {type(row).__name__}")
                yield number, row
    except UNREADABLE as error:
        raise DataError(f"{path}: line {number + 1}: not JSON lines in UTF-8: {error}") from None
