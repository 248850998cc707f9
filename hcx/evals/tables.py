"""Tables of several evaluations side by side, in English or Korean: scores, intervals, paired differences, protocols.

Numbers stand in one row only if task, version, shots, data and items are the same. Every row carries its protocol, and
the mark "not comparable" where a score must not be put beside the HyperCLOVA X report's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcx.artifacts import is_complete
from hcx.errors import EvalError
from hcx.evals.statistics import paired

WORDS = {
    "en": {
        "title": "Evaluation",
        "task": "task",
        "metric": "metric",
        "items": "items",
        "difference": "difference to the first (95 %; p)",
        "marks": "marks",
        "chance": "interval contains chance",
        "gap": "not comparable with the HyperCLOVA X report",
        "protocols": "Protocols",
        "shots": "shots",
        "data": "data",
        "judge": "judge",
        "scorer": "toxicity scorer",
        "version": "version",
        "apart": "Rows that differ in protocol, data or items",
        "skipped": "Not run",
        "sampling": "Intervals and p cover the choice of items, not that of prompts or training seeds; "
        "p is not corrected for the number of rows.",
        "averages": "Averages with the HyperCLOVA X report's definitions",
        "missing": "missing",
    },
    "ko": {
        "title": "평가 결과",
        "task": "과제",
        "metric": "지표",
        "items": "문항 수",
        "difference": "첫 모델과의 차이 (95 %; p)",
        "marks": "표시",
        "chance": "구간이 무작위 수준을 포함",
        "gap": "HyperCLOVA X 보고서와 비교 불가",
        "protocols": "프로토콜",
        "shots": "예시 수",
        "data": "데이터",
        "judge": "심판 모델",
        "scorer": "유해성 채점기",
        "version": "버전",
        "apart": "프로토콜, 데이터 또는 문항이 다른 행",
        "skipped": "실행하지 않음",
        "sampling": "구간과 p는 문항 표집의 오차만 나타내며, 프롬프트나 학습 시드의 영향은 포함하지 않습니다. "
        "p는 행 수에 대해 보정하지 않았습니다.",
        "averages": "HyperCLOVA X 보고서의 정의에 따른 평균",
        "missing": "없음",
    },
}

SAME = ("version", "shots", "items", "data", "judge", "toxicity_scorer")
"""What must be equal for two numbers to stand in one row."""


@dataclass(frozen=True)
class Run:
    """One result directory."""

    label: str
    directory: Path
    results: dict[str, Any]

    def samples(self, task: str) -> list[dict[str, Any]]:
        """The rows of a task's samples file."""
        path = self.directory / self.results["tasks"][task]["samples"]
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_run(directory: Path) -> Run:
    """A complete result directory of `hcx eval`.

    Raises:
        EvalError: it is not one.
    """
    if not is_complete(directory) or not (directory / "results.json").is_file():
        raise EvalError(f"{directory}: not a result directory of hcx eval, or not a complete one")
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    return Run(directory.name, directory, results)


def comparison(directories: Sequence[Path], language: str = "en") -> str:
    """A Markdown page that compares evaluations.

    Args:
        directories: of `hcx eval`, the first one is compared with.
        language: `en` or `ko`.

    Raises:
        EvalError: an unknown language, or a directory that is no result.
    """
    if language not in WORDS:
        raise EvalError(f"language = {language!r}; valid: {', '.join(WORDS)}")
    words = WORDS[language]
    runs = [read_run(directory) for directory in directories]
    tasks = list(dict.fromkeys(task for run in runs for task in run.results["tasks"]))
    rows, apart = [], []
    for task in tasks:
        having = [run for run in runs if task in run.results["tasks"]]
        group = [run for run in having if not _differs(having[0], run, task)]
        apart += [
            f"- `{task}`: {run.label} ({', '.join(differ)})"
            for run in having
            if (differ := _differs(having[0], run, task))
        ]
        rows += _task_rows(task, runs, group, words)
    head = [words["task"], words["metric"], words["items"], *(run.label for run in runs)]
    head += [words["difference"]] * (len(runs) > 1) + [words["marks"]]
    lines = [f"# {words['title']}", "", *_markdown([head, *rows]), "", words["sampling"], ""]
    lines += _section(words["apart"], apart)
    lines += _section(words["averages"], _averages(runs, words))
    lines += _section(words["protocols"], [_protocol(task, runs, words) for task in tasks])
    skipped = [f"- {run.label}: `{name}`: {why}" for run in runs for name, why in run.results["skipped"].items()]
    lines += _section(words["skipped"], skipped)
    return "\n".join(lines)


def _differs(first: Run, other: Run, task: str) -> list[str]:
    left, right = first.results["tasks"][task], other.results["tasks"][task]
    return [name for name in SAME if left.get(name) != right.get(name)]


def _task_rows(task: str, runs: Sequence[Run], group: Sequence[Run], words: dict[str, str]) -> list[list[str]]:
    first = group[0].results["tasks"][task]
    rows = []
    for metric, entry in first["metrics"].items():
        digits = 1 if first["category"] == "translation" else 3
        cells = [_score(run, task, metric, digits) if run in group else "" for run in runs]
        items = f"{entry['n']}" if first["items"] == first["of"] else f"{entry['n']} / {first['of']}"
        row = [f"`{task}`", metric, items, *cells]
        if len(runs) > 1:
            row.append("; ".join(_difference(group[0], run, task, metric, digits) for run in group[1:]))
        rows.append([*row, "; ".join(_marks(task, metric, group, words))])
    return rows


def _score(run: Run, task: str, metric: str, digits: int) -> str:
    entry = run.results["tasks"][task]["metrics"].get(metric)
    if entry is None:
        return ""
    interval = entry["interval"]
    shown = "" if interval is None else f" ({interval[0]:.{digits}f}, {interval[1]:.{digits}f})"
    return f"{entry['value']:.{digits}f}{shown}"


def _difference(first: Run, other: Run, task: str, metric: str, digits: int) -> str:
    left, right = (_by_item(run.samples(task), metric) for run in (first, other))
    if not left or set(left) != set(right):
        return ""
    order = sorted(left)
    found = paired([left[item] for item in order], [right[item] for item in order])
    interval = "" if found.interval is None else f" ({found.interval[0]:+.{digits}f}, {found.interval[1]:+.{digits}f}"
    p = "" if found.p is None else f"; p = {found.p:.3g}"
    return f"{found.value:+.{digits}f}{interval}{p})" if interval else f"{found.value:+.{digits}f}"


def _by_item(samples: Sequence[dict[str, Any]], metric: str) -> dict[tuple[str, int], float]:
    """Scores by item where the metric is a mean of them; empty where it is not."""
    name = "correct" if metric == "acc" and samples and "correct" in samples[0] else metric
    values = {}
    for sample in samples:
        value = sample.get(name)
        if metric == "judge" and "ratings" in sample:
            value = sum(sample["ratings"]) / len(sample["ratings"])
        if not isinstance(value, (int, float)):
            return {}
        values[str(sample.get("task", "")), int(sample["item"])] = float(value)
    return values


def _marks(task: str, metric: str, group: Sequence[Run], words: dict[str, str]) -> list[str]:
    marks = []
    guessing = [run.label for run in group if run.results["tasks"][task]["metrics"][metric].get("contains_chance")]
    if guessing:
        marks.append(f"{words['chance']}: {', '.join(guessing)}")
    first = group[0].results["tasks"][task]
    if first.get("rows") and first.get("gap"):
        marks.append(f"{words['gap']}: {first['gap']}")
    return marks + [str(entry["part"]) for entry in first.get("data", ()) if entry.get("part")]


def _protocol(task: str, runs: Sequence[Run], words: dict[str, str]) -> str:
    found = next(run.results["tasks"][task] for run in runs if task in run.results["tasks"])
    parts = [f"{words['version']} {found['version']}"]
    if found.get("shots") is not None:
        parts.append(f"{words['shots']} {found['shots']}")
    for entry in found.get("data", ()):
        name = entry["path"] if entry["name"] is None else f"{entry['path']} {entry['name']}"
        parts.append(f"{words['data']} {name} @ {entry['revision'] or '?'}")
    if found.get("judge"):
        parts.append(f"{words['judge']} {found['judge']}")
    if found.get("toxicity_scorer"):
        parts.append(f"{words['scorer']} {found['toxicity_scorer']}")
    return f"- `{task}` ({'; '.join(parts)}): {found['protocol']}"


def _averages(runs: Sequence[Run], words: dict[str, str]) -> list[str]:
    lines = []
    for run in runs:
        for name, entry in run.results.get("averages", {}).items():
            value = f"{entry['value']:.2f}" if entry["value"] is not None else "-"
            missing = f" ({words['missing']}: {', '.join(entry['missing'])})" if entry["missing"] else ""
            lines.append(f"- {run.label}: {name} {value}{missing}")
    return lines


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
