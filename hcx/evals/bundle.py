"""Evaluation data as a directory: fetched once where there is a network, read where there is none.

A bundle holds each data set that a suite's tasks ask the hub for as JSON lines in the data set's own schema, with the
hub's commit, so that lm-eval's tasks and ours read the same rows from a bundle as from the hub:

```
BUNDLE/data/PATH--CONFIG/SPLIT.jsonl     rows
BUNDLE/index.json                        data sets, revisions, digests, tasks
BUNDLE/manifest.json                     kind `eval-data`
```
No pickles, no code: JSON only.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from hcx.artifacts import digest_file, is_complete
from hcx.config import Config, decode
from hcx.errors import DataError, EvalError

INDEX = "index.json"
KIND = "eval-data"


class SplitEntry(Config):
    """One split of a data set."""

    file: str
    """Path inside the bundle."""
    rows: int
    """Lines of the file."""
    digest: str
    """Of the file's bytes."""


class DatasetEntry(Config):
    """One data set (a path on the hub and a configuration of it)."""

    path: str
    """As the task file names it: `skt/kobest_v1`."""
    name: str | None = None
    """The configuration, None for the only one."""
    revision: str | None = None
    """Commit on the hub; for files from elsewhere, where they came from."""
    part: str | None = None
    """Which part of a published split this is, where it is not all of it: goes beside every score."""
    splits: dict[str, SplitEntry]
    """By name of the split."""


class BundleIndex(Config):
    """What a bundle holds."""

    version: int = 1
    """Of this format."""
    datasets: tuple[DatasetEntry, ...] = ()
    """Every data set."""
    tasks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Task or benchmark -> keys of the data sets that it reads."""


def key(path: str, name: str | None) -> str:
    """A data set's key, which is its folder's name: no character of it has a meaning in a path."""
    text = path if name is None else f"{path}--{name}"
    return re.sub(r"[^A-Za-z0-9._-]", "__", text).lstrip(".")


@cache
def _read_index(path: str, changed_ns: int) -> BundleIndex:
    return decode(BundleIndex, json.loads(Path(path).read_text(encoding="utf-8")), path)


def read_index(bundle: str | Path | None) -> BundleIndex | None:
    """The index of a bundle, or None where the folder is not one.

    Raises:
        EvalError: a bundle that was not finished.
    """
    if bundle is None or not (Path(bundle) / INDEX).is_file():
        return None
    if not is_complete(bundle):
        raise EvalError(f"{bundle}: this bundle is not complete; fetch it again")
    path = Path(bundle) / INDEX
    return _read_index(str(path), path.stat().st_mtime_ns)


def entry_of(bundle: str | Path, path: str, name: str | None) -> DatasetEntry | None:
    """A bundle's entry for a data set."""
    index = read_index(bundle)
    return next((d for d in index.datasets if (d.path, d.name) == (path, name)), None) if index else None


def read_rows(bundle: str | Path, split: SplitEntry) -> list[dict[str, Any]]:
    """The rows of a split, its digest checked.

    Raises:
        DataError: the file is missing or is not the one that was fetched.
    """
    path = Path(bundle) / split.file
    if not path.is_file() or digest_file(path) != split.digest:
        raise DataError(f"{path}: missing or changed since it was fetched; fetch the bundle again")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@contextmanager
def replaying(bundle: str | Path | None) -> Iterator[list[DatasetEntry]]:
    """Makes `datasets.load_dataset` read from a bundle; gives the list of entries read.

    lm-eval offers no hook for this: tasks call that function by name. A data set that the bundle lacks is an error, so
    nothing reaches for the network.
    """
    import datasets

    used: list[DatasetEntry] = []

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        entry = entry_of(bundle, path, name) if bundle is not None else None
        if entry is None:
            wanted = path if name is None else f"{path} ({name})"
            where = f"the bundle {bundle}" if bundle is not None else "this machine: no bundle is named (--data)"
            raise EvalError(f"data set {wanted}: not in {where}; get it with: hcx eval fetch SUITE --out BUNDLE")
        if entry not in used:
            used.append(entry)
        chosen = {split: entry.splits[split]} if split is not None and split in entry.splits else entry.splits
        found = {label: datasets.Dataset.from_list(read_rows(bundle or "", value)) for label, value in chosen.items()}
        return found[split] if split is not None else datasets.DatasetDict(found)

    with _patched(datasets, load_dataset):
        yield used


@contextmanager
def _patched(datasets: Any, function: Callable[..., Any]) -> Iterator[None]:
    original = datasets.load_dataset
    datasets.load_dataset = function
    try:
        yield
    finally:
        datasets.load_dataset = original


class Recorder:
    """Writes what passes through `datasets.load_dataset` into a bundle.

    Args:
        folder: the bundle's folder, being written.
        revision_of: the commit of a data set on the hub, or None where it cannot be known.
    """

    def __init__(self, folder: Path, revision_of: Callable[[str], str | None]) -> None:
        self._folder, self._revision_of = folder, revision_of
        self.datasets: dict[str, DatasetEntry] = {}
        self.tasks: dict[str, list[str]] = {}
        self.failed: dict[str, str] = {}

    @contextmanager
    def recording(self, task: str) -> Iterator[list[DatasetEntry]]:
        """While this lasts, data sets that are loaded are written and listed under the task."""
        import datasets

        original = datasets.load_dataset
        keys = self.tasks.setdefault(task, [])

        def load_dataset(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
            label = key(path, name)
            revision = options.pop("revision", None) or self._revision_of(path)
            loaded = original(path, name, **options, **({"revision": revision} if revision else {}))
            if label not in self.datasets:
                self.add(path, name, dict(loaded), revision)
            if label not in keys:
                keys.append(label)
            return loaded[split] if split is not None else loaded

        with _patched(datasets, load_dataset):
            yield []

    def add(
        self,
        path: str,
        name: str | None,
        splits: Mapping[str, Any],
        revision: str | None,
        part: str | None = None,
    ) -> None:
        """Writes a data set."""
        label = key(path, name)
        entries = {}
        for split, rows in splits.items():
            file = Path("data") / label / f"{re.sub(r'[^A-Za-z0-9._-]', '_', split)}.jsonl"
            (self._folder / file).parent.mkdir(parents=True, exist_ok=True)
            count = 0
            with open(self._folder / file, "w", encoding="utf-8") as out:
                for row in rows:
                    out.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
                    count += 1
            entries[split] = SplitEntry(file=str(file), rows=count, digest=digest_file(self._folder / file))
        self.datasets[label] = DatasetEntry(path=path, name=name, revision=revision, part=part, splits=entries)

    def finish(self) -> BundleIndex:
        """Writes the index."""
        index = BundleIndex(
            datasets=tuple(self.datasets[label] for label in sorted(self.datasets)),
            tasks={task: tuple(keys) for task, keys in sorted(self.tasks.items()) if task not in self.failed},
        )
        text = json.dumps(index.model_dump(), ensure_ascii=False, indent=1)
        (self._folder / INDEX).write_text(text + "\n", encoding="utf-8")
        return index


def _plain(value: Any) -> Any:
    """What JSON does not know and data sets hold: dates, arrays, bytes."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise DataError(f"a column holds {type(value).__name__}, which a bundle cannot hold")
