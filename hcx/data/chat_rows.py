"""Conversations out of files: the forms in which instruction data is published, recognised row by row.

| keys of a row | form |
|---|---|
| `messages` | `[{role, content}, ...]` |
| `conversations` | ShareGPT: `[{from, value}, ...]`, or as `messages` |
| `instruction`, `input`, `output` | Alpaca; the input follows the instruction after a blank line |
| `instruction`, `instances` | Self-Instruct: one conversation per instance `{input, output}` |
| `prompt`, `response` (or `completion`, `output`) | one exchange |
| two columns that the source names | one exchange; also CSV and TSV |
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hcx.config import Config
from hcx.errors import DataError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Names of roles in published data -> ours."""
_ANSWERS = ("response", "completion", "output")
_FORMS = "messages, conversations, instruction/output, prompt/response"


class ChatSource(Config):
    """A file of conversations."""

    path: str
    """JSON lines (`.jsonl`), CSV or TSV with a header, also `.gz` or `.xz`; may be a pattern such as `chat/*.jsonl`."""
    question: str | None = None
    """Key or column that holds the user's text; the form is recognised by its keys if not given."""
    answer: str | None = None
    """Key or column that holds the assistant's text; goes with `question`."""
    instruction: str = ""
    """With `question`: stands before the user's text, with a blank line between."""
    name: str | None = None
    """Names the source in counts and shares; the file's name if not given."""
    limit: int | None = None
    """Only the first so many conversations; all if not given."""


@dataclass(frozen=True)
class Conversation:
    """Messages (`role`, `content`) in order.

    Attributes:
        messages: of the roles `system`, `user` and `assistant`.
        source: the source's name.
        place: file and line, for errors.
        split: `validation` or `train` where the row states it.
    """

    messages: tuple[dict[str, str], ...]
    source: str
    place: str
    split: str | None = None


def read_conversations(source: ChatSource, folder: Path) -> Iterator[Conversation]:
    """The conversations of a source, in the order of its files.

    Args:
        source: what to read.
        folder: what relative paths are relative to.

    Raises:
        DataError: a file is missing or damaged, or a row has no known form; file and line are named.
    """
    if (source.question is None) != (source.answer is None):
        raise DataError(f"{source.path}: question and answer name two columns together; give both or neither")
    count = 0
    for path in chat_files(source, folder):
        for place, row in _rows(path):
            for messages in _conversations(row, source, place):
                if count == source.limit:
                    return
                count += 1
                split = row.get("split")
                name = source.name or path.name.partition(".")[0]
                yield Conversation(messages, name, place, split if split in ("train", "validation") else None)


def chat_files(source: ChatSource, folder: Path) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        DataError: there is none.
    """
    found = sorted(Path(path) for path in glob.glob(str(folder / source.path), recursive=True) if Path(path).is_file())
    if not found:
        raise DataError(f"{folder / source.path}: no such file, and no file matches the pattern")
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row."""
    form = next((suffix for suffix in path.suffixes[::-1] if suffix not in (".gz", ".xz")), "")
    if form not in (".jsonl", ".csv", ".tsv"):
        raise DataError(f"{path}: conversations are read from .jsonl, .csv and .tsv (also .gz, .xz)")
    number = 0
    try:
        with _open(path) as file:
            if form == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}: line {number}", _object(line, f"{path}: line {number}")
            else:
                table = csv.DictReader(file, delimiter="\t" if form == ".tsv" else ",", strict=True)
                for row in table:
                    number = table.line_num
                    yield f"{path}: line {number}", row
    except (UnicodeDecodeError, ValueError, csv.Error, OSError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: line {number + 1}: not rows in UTF-8: {error}") from None


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be a JSON object")
    return row


def _open(path: Path) -> IO[str]:
    openers: Mapping[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    # Python's csv wants to see line breaks as they are: a quoted field may hold some.
    file: IO[str] = openers.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="")
    return file


def _conversations(row: Mapping[str, Any], source: ChatSource, place: str) -> Iterator[tuple[dict[str, str], ...]]:
    if source.question is not None and source.answer is not None:
        missing = [name for name in (source.question, source.answer) if not isinstance(row.get(name), str)]
        if missing:
            raise DataError(f"{place}: no text under {missing[0]!r}; the row has: {', '.join(map(str, row))}")
        question = row[source.question]
        asked = _joined(source.instruction, question) if source.instruction else question
        pairs: list[tuple[Any, Any]] = [(asked, row[source.answer])]
    elif "messages" in row or "conversations" in row:
        key = "messages" if "messages" in row else "conversations"
        yield _turns(row[key], row.get("system"), f"{place}: {key}")
        return
    elif "instruction" in row:
        instances = row["instances"] if isinstance(row.get("instances"), list) else [row]
        pairs = [(_joined(row["instruction"], i.get("input")), _answer(i)) for i in instances if isinstance(i, dict)]
    elif "prompt" in row:
        pairs = [(row["prompt"], _answer(row))]
    else:
        raise DataError(
            f"{place}: no known form of conversation; known: {_FORMS}; the row has: {', '.join(map(str, row))}. "
            "For other names set the source's question and answer"
        )
    for question, answer in pairs:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield _turns(turns, row.get("system"), place)


def _joined(instruction: Any, given: Any) -> Any:
    return f"{instruction}\n\n{given}" if isinstance(given, str) and given.strip() else instruction


def _answer(row: Mapping[str, Any]) -> Any:
    return next((row[key] for key in _ANSWERS if key in row), None)


def _turns(turns: Any, system: Any, place: str) -> tuple[dict[str, str], ...]:
    if not isinstance(turns, list):
        raise DataError(f"{place}: must be a list of messages, is {type(turns).__name__}")
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DataError(f"{place}[{number}]: must be an object with a role and a content")
        stated = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        role = ROLES.get(str(stated).lower())
        if role is None:
            raise DataError(f"{place}[{number}]: role {stated!r} is not known; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{place}[{number}]: the content must be text, is {type(content).__name__}")
        messages.append({"role": role, "content": content})
    return tuple(messages)
