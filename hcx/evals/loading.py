"""From names to lm-eval's task objects: our task files strictly, lm-eval's own by name, data from a bundle only."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any

from hcx.artifacts import find_resource
from hcx.errors import EvalError, HcxError, MissingExtra
from hcx.evals.bundle import DatasetEntry, replaying
from hcx.evals.catalog import TaskCard, is_installed, tasks_directory
from hcx.evals.sources import data_directory

FEWSHOT_SEED = 1234
"""lm-eval's own default, so that exemplars are those of its command."""

SAMPLE_ROWS = "evals/sample_rows.json"
"""Invented rows in the schema of each data set, for checking tasks where the data is not."""


@dataclass
class LoadedTasks:
    """Task objects by their own names, and which of them make up each card.

    Attributes:
        tasks: lm-eval's name of a task -> task.
        parts: card -> names of its tasks, one unless it is a group.
        datasets: card -> what was read from a bundle.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    datasets: dict[str, list[DatasetEntry]] = field(default_factory=dict)

    def drop(self, card: str) -> None:
        """Leaves a card out."""
        for name in self.parts.pop(card):
            del self.tasks[name]

    def for_lm_eval(self) -> dict[str, Any]:
        """What lm-eval's evaluator takes."""
        return {"tasks": self.tasks, "groups": {}, "group_map": {}}


Access = Callable[[TaskCard], AbstractContextManager[list[DatasetEntry]]]


def load_tasks(
    cards: Sequence[TaskCard], model_directory: str | None, data: str | Path | None, access: Access | None = None
) -> LoadedTasks:
    """lm-eval's task objects, with what their items need to know about the model.

    Args:
        cards: tasks that lm-eval runs (not those of a judge).
        model_directory: the model's, which holds the tokenizer.
        data: a bundle or a folder of item files.
        access: how data sets are loaded, given the card; from the bundle, and from nowhere else, if not given.

    Raises:
        EvalError: a task file is broken, or its data is not here.
    """
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {"pretrained": model_directory, "data": None if data is None else str(data)}
    managers: dict[bool, Any] = {}
    loaded = LoadedTasks()
    for card in cards:
        if card.is_ours not in managers:
            # lm-eval reads thousands of files to know its own tasks; ours need none of them.
            managers[card.is_ours] = TaskManager(
                include_path=str(tasks_directory()), include_defaults=not card.is_ours, metadata=metadata
            )
        name = card.benchmark.lm_eval if card.benchmark is not None else card.name
        with access(card) if access is not None else replaying(data_directory(data)) as used:
            try:
                found = managers[card.is_ours].load([name])["tasks"]
            except HcxError:
                raise
            except Exception as error:
                raise EvalError(f"task {card.name!r} ({card.path}): {type(error).__name__}: {error}") from error
        if not found:
            raise EvalError(f"task {card.name!r}: lm-eval has no task or group {name!r}; install lm-eval==0.4.13")
        excluded = card.benchmark.exclude if card.benchmark is not None else ()
        found = {key: task for key, task in found.items() if key not in excluded}
        for key, task in found.items():
            _set_shots(task, card)
            if key in loaded.tasks:
                raise EvalError(f"{key} is part of two of the tasks asked for, {card.name} and another; run them apart")
            loaded.tasks[key] = task
        loaded.parts[card.name] = list(found)
        loaded.datasets[card.name] = list(used)
    return loaded


def _set_shots(task: Any, card: TaskCard) -> None:
    # A task that pins 0 has its exemplars in the prompt: more would be another benchmark.
    if card.benchmark is not None and card.shots is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=card.shots)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


@contextmanager
def sample_rows() -> Iterator[None]:
    """Makes `datasets.load_dataset` answer with invented rows of the right schema."""
    import datasets

    rows = json.loads(find_resource(SAMPLE_ROWS).read_text(encoding="utf-8"))

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        splits = rows.get(path, {}).get(name or "") or rows.get(path, {}).get("*")
        if splits is None:
            raise EvalError(f"{SAMPLE_ROWS}: no rows for {path} ({name}); write some in its schema")
        found = {label: datasets.Dataset.from_list(part) for label, part in splits.items()}
        return found[split] if split is not None else datasets.DatasetDict(found)

    original = datasets.load_dataset
    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


def load_on_samples(card: TaskCard) -> Any:
    """One of our tasks on invented rows: every function resolved and called, without its data."""
    from lm_eval.tasks import TaskManager

    with sample_rows():
        manager = TaskManager(
            include_path=str(tasks_directory()), include_defaults=False, metadata={"pretrained": None, "data": None}
        )
        task = manager.load([card.name])["tasks"][card.name]
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    # Invented rows are fewer than exemplars; one shows the form of them all.
    if task.get_config("num_fewshot"):
        task.set_config(key="num_fewshot", value=1)
    return task


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """lm-eval without its progress bars and notices, and without the network.

    Raises:
        MissingExtra: lm-eval is not installed.
    """
    if not is_installed("lm_eval"):
        raise MissingExtra("lm-eval", "eval", "evaluation")
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    import datasets
    from tqdm import tqdm

    # Bars that lm-eval offers no switch for; those with a switch are switched off where they are called.
    shown, bars = tqdm.__init__, datasets.are_progress_bars_disabled()
    tqdm.__init__ = partialmethod(shown, disable=True)  # type: ignore[method-assign]
    datasets.disable_progress_bars()
    registry = logging.getLogger("lm_eval.api.registry")
    registry.addFilter(_is_no_lookup)
    try:
        yield
    finally:
        registry.removeFilter(_is_no_lookup)
        if not bars:
            datasets.enable_progress_bars()
        tqdm.__init__ = shown  # type: ignore[method-assign]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_no_lookup(record: logging.LogRecord) -> bool:
    """False for lm-eval's notice that a metric which a task computes itself is not on the hub either."""
    return "not found in the evaluate library" not in record.getMessage()
