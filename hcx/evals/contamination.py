"""Whether evaluation items are in training text: shared n-grams, counted for each task (`hcx.data.filters`)."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hcx.data.document import Document
from hcx.data.filters.decontaminate import DecontaminateConfig, Decontaminator
from hcx.data.filters.evaluation import FileItems
from hcx.errors import DataError, EvalError
from hcx.evals.bundle import key, read_index, read_rows
from hcx.evals.catalog import TaskCard
from hcx.evals.sources import data_directory


def item_texts(card: TaskCard, data: str | Path | None) -> list[str]:
    """The texts of a card's items, all fields of a row joined: a leak of question, options or answer is a leak.

    Raises:
        EvalError: the items are not here.
    """
    folder = data_directory(data)
    index = read_index(folder) if folder is not None else None
    if index is None or card.name not in index.tasks:
        return _own_items(card, data)
    texts = []
    for entry in index.datasets:
        if key(entry.path, entry.name) not in index.tasks[card.name]:
            continue
        # Training and exemplar splits are no secrets of the test.
        held_out = [str(name) for name in ("test", "devtest", "validation") if name in entry.splits]
        chosen = held_out[:1] or list(entry.splits)
        for split in chosen:
            texts += ["\n".join(_strings(row)) for row in read_rows(folder or "", entry.splits[split])]
    return texts


def _own_items(card: TaskCard, data: str | Path | None) -> list[str]:
    from hcx.evals.catalog import status_of
    from hcx.evals.loading import load_tasks, quiet_lm_eval

    status = status_of(card, data)
    if status.status != "runs" or not card.is_ours:
        raise EvalError(f"{card.name}: its items are not here: {status.reason or 'fetch them into a bundle'}")
    with quiet_lm_eval():
        loaded = load_tasks([card], None, data)
    return ["\n".join(_strings(dict(doc))) for doc in loaded.tasks[card.name].eval_docs]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)


def texts_of(path: Path) -> Iterator[str]:
    """The `text` of each line of a JSON-lines file, packed or not.

    Raises:
        DataError: no such file, or a line without text.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file (given by --against)")
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}:{number}: a JSON object with `text` is expected") from None


def contamination(
    cards: Sequence[TaskCard], data: str | Path | None, against: Path | Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Per task: items, those too short to look for, those found, and documents that hold one.

    Args:
        cards: the tasks; those whose items are not here are left out with the reason under `missing`.
        data: a bundle or a folder of item files.
        against: training text: a file, or texts.
    """
    items: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for card in cards:
        try:
            items[card.name] = item_texts(card, data)
        except EvalError as error:
            missing[card.name] = str(error)
    if not items:
        raise EvalError("no items to look for:\n" + "\n".join(f"  {why}" for why in missing.values()))
    # The configuration wants a source; the items are given here instead.
    config = DecontaminateConfig(against=(FileItems(name="tasks", path="-", fields=("text",)),))
    looker = Decontaminator(items, config)
    for number, text in enumerate(texts_of(against) if isinstance(against, Path) else against):
        looker.clean(Document(text=text, source="training text", name=str(number)))
    return {name: counts.to_json() for name, counts in looker.sets.items()}
