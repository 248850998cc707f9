"""Which tasks and suites there are and whether they can run here, read from `evals/` without importing lm-eval."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from hcx.artifacts import find_resource, resource_names
from hcx.config import Config, decode, load_config
from hcx.errors import ConfigError, EvalError, did_you_mean
from hcx.evals.sources import Source, missing_data

TASKS = "evals/tasks"
SUITES = "evals/suites"


class TaskMetadata(Config):
    """The `metadata` of a task's YAML: what lm-eval does not know about it."""

    version: int | float
    """Raised whenever a change makes scores incomparable."""
    suite: str
    """The suite that the task belongs to first."""
    language: Literal["ko", "en", "code", "ko-en", "en-ko"]
    """Language of the text; source-target for translation."""
    category: Literal["language modelling", "knowledge", "translation"]
    """What is measured."""
    source: Source
    """Where the items come from."""
    protocol: str
    """How the score comes about and what it must not be taken for, in a sentence or two."""


class SuiteTask(Config):
    """A task in a suite."""

    name: str
    """Name of the task."""
    limit: int | None = None
    """Only the first items, for suites that must be quick; None: all."""


class Suite(Config):
    """A named list of tasks: `evals/suites/NAME.yaml`."""

    description: str
    """What the suite is for."""
    tasks: tuple[SuiteTask, ...]
    """In the order of display."""


@dataclass(frozen=True)
class TaskCard:
    """A task as a user sees it."""

    name: str
    path: Path
    metadata: TaskMetadata


@dataclass(frozen=True)
class TaskStatus:
    """One row of `hcx eval --list`."""

    name: str
    suite: str
    suites: list[str]
    language: str
    category: str
    version: int | float
    status: Literal["runs", "needs-data", "unavailable"]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, for scripts."""
        return asdict(self)


class _Constructor(SafeConstructor):
    """YAML with lm-eval's `!function` kept as its text: nothing is imported."""


_Constructor.add_constructor("!function", lambda loader, node: node.value)


def _read_task(path: Path) -> dict[str, Any]:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        values = yaml.load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not isinstance(values.get("task"), str):
        raise ConfigError(f"{path}: a task file is a mapping with the key 'task'")
    return values


def tasks_directory() -> Path:
    """The folder of shipped task files, as lm-eval's `include_path` wants it."""
    return find_resource(TASKS)


def task_cards() -> dict[str, TaskCard]:
    """Every shipped task by name.

    Raises:
        ConfigError: a task file is malformed or its metadata is.
    """
    cards = {}
    for path in sorted(tasks_directory().rglob("*.yaml")):
        values = _read_task(path)
        metadata = decode(TaskMetadata, values.get("metadata") or {}, f"{path}: metadata")
        cards[values["task"]] = TaskCard(values["task"], path, metadata)
    return dict(sorted(cards.items()))


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return [Path(name).stem for name in resource_names(SUITES)]


def load_suite(name: str) -> Suite:
    """A suite by name.

    Raises:
        EvalError: no such suite, or it lists a task that does not exist.
    """
    if name not in suite_names():
        raise EvalError(f"suite {name!r}: unknown; {did_you_mean(name, suite_names())}")
    suite = load_config(Suite, find_resource(f"{SUITES}/{name}.yaml"))
    find_tasks([task.name for task in suite.tasks])
    return suite


def find_tasks(names: Sequence[str]) -> list[TaskCard]:
    """Tasks by name.

    Raises:
        EvalError: a name is unknown; the nearest one is suggested.
    """
    cards = task_cards()
    for name in names:
        if name not in cards:
            raise EvalError(f"task {name!r}: unknown; {did_you_mean(name, cards)}")
    return [cards[name] for name in names]


def is_installed(package: str) -> bool:
    """Whether a package could be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def status_of(card: TaskCard, data: str | Path | None = None) -> TaskStatus:
    """Whether a task can run here, and why not.

    Args:
        card: the task.
        data: folder of item files that are not shipped.
    """
    meta = card.metadata
    status: Literal["runs", "needs-data", "unavailable"] = "runs"
    reason = ""
    absent = [name for name in _needed_packages(meta) if not is_installed(name)]
    if absent:
        status = "unavailable"
        reason = f"needs {' and '.join(absent)}; install with: pip install 'hcx-llm[eval]'"
    else:
        reason = missing_data(meta.source, meta.language, data) or ""
        status = "needs-data" if reason else "runs"
    suites = [name for name in suite_names() if any(task.name == card.name for task in _suite(name).tasks)]
    return TaskStatus(card.name, meta.suite, suites, meta.language, meta.category, meta.version, status, reason)


def _suite(name: str) -> Suite:
    return load_config(Suite, find_resource(f"{SUITES}/{name}.yaml"))


def _needed_packages(meta: TaskMetadata) -> list[str]:
    needed = ["lm_eval", "transformers"]
    return [*needed, "sacrebleu"] if meta.category == "translation" else needed
