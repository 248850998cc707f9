"""Which tasks and suites there are and whether they can run here, read from `evals/` without importing lm-eval."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from hcx.artifacts import find_resource, resource_names
from hcx.config import Config, decode, load_config
from hcx.errors import ConfigError, EvalError, did_you_mean
from hcx.evals.bundle import read_index
from hcx.evals.sources import DATA_SETS, DATA_VARIABLE, Source, data_directory, missing_data

TASKS = "evals/tasks"
SUITES = "evals/suites"
BENCHMARKS = "evals/benchmarks"

Language = Literal[
    "ko", "en", "code", "ko-en", "en-ko", "ja-ko", "ko-ja", "zh-ko", "ko-zh", "ar", "hi", "th", "ur", "vi", "zh", "ja"
]
Category = Literal[
    "language modelling",
    "knowledge",
    "reasoning",
    "commonsense",
    "factuality",
    "mathematics",
    "code",
    "chat",
    "instruction",
    "harmlessness",
    "translation",
    "crosslingual",
]
EXTRA_OF = {"sympy": "math", "math_verify": "math", "antlr4": "math"}
"""Packages of tasks that the extra `eval` does not hold."""
MEANS = ("sandbox", "toxicity", "judge", "punkt_tab")
"""Needs that are no packages."""


class TaskMetadata(Config):
    """The `metadata` of a task's YAML: what lm-eval does not know about it."""

    version: int | float
    """Raised whenever a change makes scores incomparable."""
    suite: str
    """The suite that the task belongs to first."""
    language: Language
    """Language of the text; source-target for translation."""
    category: Category
    """What is measured."""
    source: Source
    """Where the items come from; `hub`: the data set that the task file names, from a bundle; `files`: one that is not
    on the hub, made from its authors' files (`hcx eval fetch --from`)."""
    rows: tuple[str, ...] = ()
    """Rows of the HyperCLOVA X report's list of benchmarks that this task answers."""
    gap: str = ""
    """Why a score must not stand beside the report's; empty where it may."""
    needs: tuple[str, ...] = ()
    """Packages beyond lm-eval, and `sandbox`, `toxicity` (a scorer), `judge` or `punkt_tab` (NLTK's sentences)."""
    config: str | None = None
    """Configuration of the data set, where a function reads it."""
    layout: Literal["psm", "spm"] | None = None
    """Order of an infilling prompt."""
    protocol: str
    """How the score comes about and what it must not be taken for, in a sentence or two."""


class Benchmark(Config):
    """A benchmark that is lm-eval's own task, is scored by a judge, or cannot be run by anybody outside its makers."""

    name: str
    """The name to run it by."""
    title: str
    """Its own name."""
    rows: tuple[str, ...] = ()
    """Rows of the HyperCLOVA X report's list of benchmarks."""
    suite: str
    """The suite that it belongs to first."""
    language: Language
    """Language of the text."""
    category: Category
    """What is measured."""
    lm_eval: str | None = None
    """Task or group of lm-eval that is run."""
    exclude: tuple[str, ...] = ()
    """Tasks of the group that are left out."""
    shots: int | None = None
    """Exemplars; None: what lm-eval's task says."""
    judged: Literal["mt-bench", "komt-bench", "logickor", "factscore"] | None = None
    """The form of dialogue and verdict."""
    datasets: tuple[str, ...] = ()
    """Data sets on the hub that it reads."""
    needs: tuple[str, ...] = ()
    """Packages beyond lm-eval, and `judge` or `punkt_tab`."""
    unavailable: str = ""
    """Why nobody outside can run it."""
    protocol: str
    """How the score comes about, in a sentence or two."""
    gap: str = ""
    """Why a score must not stand beside the report's; empty where it may."""


class BenchmarkFile(Config):
    """A file under `evals/benchmarks/`."""

    benchmarks: tuple[Benchmark, ...]
    """In the order of display."""


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
    datasets: tuple[tuple[str, str | None], ...] = ()
    shots: int | None = None
    benchmark: Benchmark | None = None

    @property
    def is_ours(self) -> bool:
        """Whether a task file of ours defines it."""
        return self.benchmark is None


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
    rows: list[str]
    shots: int | None
    protocol: str
    gap: str

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
    """Every task and benchmark by name.

    Raises:
        ConfigError: a file is malformed, its metadata is, or two have one name.
    """
    return dict(_read_cards(tasks_directory()))


@cache
def _read_cards(tasks: Path) -> dict[str, TaskCard]:
    """Read once: a suite's tasks are looked up by name again and again."""
    cards: dict[str, TaskCard] = {}
    for path in sorted(tasks.rglob("*.yaml")):
        values = _read_task(path)
        metadata = decode(TaskMetadata, values.get("metadata") or {}, f"{path}: metadata")
        datasets: tuple[tuple[str, str | None], ...] = ()
        if "dataset_path" in values:
            datasets = ((values["dataset_path"], values.get("dataset_name")),)
        _add(cards, TaskCard(values["task"], path, metadata, datasets, values.get("num_fewshot")))
    for name in resource_names(BENCHMARKS):
        path = find_resource(name)
        for benchmark in load_config(BenchmarkFile, path).benchmarks:
            metadata = TaskMetadata(
                version=1,
                suite=benchmark.suite,
                language=benchmark.language,
                category=benchmark.category,
                source="hub",
                rows=benchmark.rows,
                gap=benchmark.gap,
                needs=benchmark.needs,
                protocol=benchmark.protocol,
            )
            datasets = tuple((path, None) for path in benchmark.datasets)
            _add(cards, TaskCard(benchmark.name, path, metadata, datasets, benchmark.shots, benchmark))
    return dict(sorted(cards.items()))


def _add(cards: dict[str, TaskCard], card: TaskCard) -> None:
    if card.name in cards:
        raise ConfigError(f"{card.path}: task {card.name!r} is defined in {cards[card.name].path} too")
    cards[card.name] = card


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


def require_tasks_or_suite(tasks: Sequence[str] | None, suite: str | None) -> None:
    """Raises EvalError: both are named."""
    if tasks and suite:
        raise EvalError("give either tasks or a suite, not both")


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
        data: a bundle, or a folder of item files that are not shipped.
    """
    meta = card.metadata
    status: Literal["runs", "needs-data", "unavailable"] = "runs"
    reason = ""
    absent = [name for name in _needed_packages(meta) if not is_installed(name)]
    if card.benchmark is not None and card.benchmark.unavailable:
        status, reason = "unavailable", card.benchmark.unavailable
    elif absent:
        status = "unavailable"
        extras = ",".join(dict.fromkeys(EXTRA_OF.get(name, "eval") for name in absent))
        reason = f"needs {' and '.join(absent)}; install with: pip install 'hcx-llm[{extras}]'"
    elif "sandbox" in meta.needs and sys.platform != "linux":
        status, reason = "unavailable", "generated code runs in a sandbox of Linux namespaces only"
    else:
        reasons = [_missing_data(card, data), *(_missing_means(need) for need in meta.needs)]
        reason = "; ".join(text for text in reasons if text)
        status = "needs-data" if reason else "runs"
    return TaskStatus(
        name=card.name,
        suite=meta.suite,
        suites=[name for name in suite_names() if any(task.name == card.name for task in _suite(name).tasks)],
        language=meta.language,
        category=meta.category,
        version=meta.version,
        status=status,
        reason=reason,
        rows=list(meta.rows),
        shots=card.shots,
        protocol=meta.protocol,
        gap=meta.gap,
    )


@cache
def _suite(name: str) -> Suite:
    return load_config(Suite, find_resource(f"{SUITES}/{name}.yaml"))


def _missing_data(card: TaskCard, data: str | Path | None) -> str:
    if card.metadata.source not in DATA_SETS:
        return missing_data(card.metadata.source, card.metadata.language, data) or ""
    folder = data_directory(data)
    if folder is not None and not folder.is_dir():
        return f"{folder}: no such folder (given by --data or {DATA_VARIABLE})"
    if folder is not None and card.benchmark is not None and (folder / f"{card.name}.jsonl").is_file():
        return ""
    index = read_index(folder)
    if index is not None:
        if card.name in index.tasks:
            return ""
        held = {(entry.path, entry.name) for entry in index.datasets}
        if card.is_ours and card.datasets and set(card.datasets) <= held:
            return ""
    names = ", ".join(path if name is None else f"{path} ({name})" for path, name in card.datasets)
    if card.metadata.source == "files":
        return f"needs {names}, which is not on the hub: its authors' files in a FOLDER, then --from FOLDER"
    return f"needs {names}: hcx eval fetch {card.name} --out BUNDLE where there is a network, then --data BUNDLE"


def _missing_means(need: str) -> str:
    if need == "toxicity":
        from hcx.evals.toxicity import why_no_scorer

        return why_no_scorer()
    if need == "judge":
        from hcx.evals.judge import why_no_judge

        return why_no_judge()
    if need == "punkt_tab":
        return _why_no_punkt()
    return ""


def _why_no_punkt() -> str:
    """lm-eval's IFEval counts sentences by NLTK's model, and downloads it unasked where it is not."""
    try:
        import nltk.data

        nltk.data.find("tokenizers/punkt_tab")
    except ImportError:
        return "needs nltk; install with: pip install 'hcx-llm[eval]'"
    except LookupError:
        return (
            "needs NLTK's punkt_tab: python -m nltk.downloader -d FOLDER punkt_tab where there is a network, then "
            "NLTK_DATA=FOLDER"
        )
    return ""


def _needed_packages(meta: TaskMetadata) -> list[str]:
    needed = ["lm_eval", "transformers", *(need for need in meta.needs if need not in MEANS)]
    return [*needed, "sacrebleu"] if meta.category == "translation" and "sacrebleu" not in needed else needed
