"""`hcx eval fetch`: the data of a suite into a bundle, from the hub or from files that their authors publish."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from hcx.artifacts import new_artifact
from hcx.errors import EvalError
from hcx.evals.bundle import KIND, DatasetEntry, Recorder
from hcx.evals.catalog import TaskCard, find_tasks, load_suite, status_of, suite_names
from hcx.evals.chat import is_judged
from hcx.evals.published_sets import add_published
from hcx.evals.sources import DATA_SETS


def cards_named(names: Sequence[str]) -> list[TaskCard]:
    """Tasks by their own names and by those of suites, each once.

    Raises:
        EvalError: a name is neither.
    """
    wanted: dict[str, None] = {}
    for name in names:
        listed = [task.name for task in load_suite(name).tasks] if name in suite_names() else [name]
        wanted.update(dict.fromkeys(listed))
    return find_tasks(list(wanted))


def needs_hub(card: TaskCard) -> bool:
    """Whether a card reads data sets that a bundle can hold."""
    unavailable = card.benchmark is not None and bool(card.benchmark.unavailable)
    return card.metadata.source in DATA_SETS and not unavailable


def fetch(names: Sequence[str], out: str | Path, folder: str | Path | None = None) -> dict[str, Any]:
    """Writes a bundle.

    Args:
        names: suites and tasks.
        out: the new bundle.
        folder: instead of the hub: a folder with sets as their authors publish them (`docs/evaluation.md` lists them).

    Returns:
        `datasets` (path, name, revision, part, rows), `tasks` that can run from the bundle, `failed` with reasons.

    Raises:
        EvalError: nothing could be fetched.
    """
    cards = [card for card in cards_named(names) if needs_hub(card)]
    if not cards:
        raise EvalError(f"{', '.join(names)}: no task there reads data that can be fetched")
    config = {"names": list(names), "from": None if folder is None else str(folder)}
    with new_artifact(out, KIND, config) as writer:
        recorder = Recorder(writer.path, _revision if folder is None else _no_revision)
        if folder is not None:
            add_published(recorder, Path(folder), cards)
        else:
            _from_hub(recorder, cards)
        if not recorder.datasets:
            reasons = "\n".join(f"  {name}: {why}" for name, why in recorder.failed.items())
            raise EvalError(f"nothing could be fetched:\n{reasons}")
        index = recorder.finish()
        writer.counts.update(datasets=len(index.datasets), tasks=len(index.tasks))
    rows = [
        {
            "path": d.path,
            "name": d.name,
            "revision": d.revision,
            "part": d.part,
            "rows": {name: split.rows for name, split in d.splits.items()},
        }
        for d in index.datasets
    ]
    return {"datasets": rows, "tasks": sorted(index.tasks), "failed": recorder.failed}


@contextmanager
def data_from(names: Sequence[str], folder: Path | None, data: Path | None) -> Iterator[Path | None]:
    """Where tasks find their data: what `data` names, or, while this lasts, a bundle made of published files.

    Args:
        names: suites and tasks.
        folder: published files, as for `fetch`; None: `data` is given back.
        data: a bundle or a folder of item files.

    Raises:
        EvalError: both are named, or nothing in the folder is of these tasks.
    """
    if folder is None:
        yield data
        return
    if data is not None:
        raise EvalError("--data and --from: give one, a bundle or a folder of published files")
    if not any(needs_hub(card) for card in cards_named(names)):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="hcx-bundle-") as temporary:
        bundle = Path(temporary) / "bundle"
        fetch(names, bundle, folder)
        yield bundle


def _from_hub(recorder: Recorder, cards: Sequence[TaskCard]) -> None:
    # Read when the hub's library is imported; an offline setting of the caller's would win silently.
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[variable] = "0"
    from hcx.evals.loading import load_tasks

    def access(card: TaskCard) -> AbstractContextManager[list[DatasetEntry]]:
        return recorder.recording(card.name)

    for card in cards:
        try:
            if is_judged(card):
                import datasets

                with recorder.recording(card.name):
                    for path, name in card.datasets:
                        datasets.load_dataset(path, name)
            else:
                load_tasks([card], None, None, access)
        except Exception as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            recorder.failed[card.name] = status_of(card).reason if card.metadata.source == "files" else told


def _no_revision(path: str) -> str | None:
    return None


def _revision(path: str) -> str | None:
    """The data set's commit on the hub, so that what is loaded is what is recorded."""
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(path).sha)
