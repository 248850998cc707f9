"""From a model directory and task names to `results.json`: scores with standard errors, intervals and chance."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcx.artifacts import artifact_input, new_artifact
from hcx.errors import EvalError, did_you_mean
from hcx.evals.aggregate import aggregate, report_scores
from hcx.evals.catalog import TaskCard, find_tasks, load_suite, require_tasks_or_suite, status_of, task_cards
from hcx.evals.chat import is_judged, run_judged
from hcx.evals.comet import WHY_NONE, chosen_scorer
from hcx.evals.judge import chosen_judge
from hcx.evals.loading import LoadedTasks, load_on_samples, load_tasks, quiet_lm_eval
from hcx.evals.measure import measure
from hcx.evals.programs import Sentinels
from hcx.evals.toxicity import scorer_identity

if TYPE_CHECKING:
    from hcx.evals.lm import HcxLM
    from hcx.model.load import LoadedModel

KIND = "eval"
DEFAULT_SUITE = "demo"
REPORT_SUITE = "hcx-report"


@dataclass(frozen=True)
class Chosen:
    """A task to run and how many of its items."""

    card: TaskCard
    limit: int | None


def choose(
    tasks: Sequence[str] | None, suite: str | None, limit: int | None, data: str | Path | None
) -> tuple[list[Chosen], dict[str, str]]:
    """The tasks to run, and those of a suite that cannot run here with the reason.

    Raises:
        EvalError: a task or suite is unknown, a task asked for by name cannot run, or none is left.
    """
    require_tasks_or_suite(tasks, suite)
    if limit is not None and limit < 1:
        raise EvalError(f"limit = {limit}; must be at least 1")
    if tasks:
        chosen = [Chosen(card, limit) for card in find_tasks(tasks)]
    else:
        listed = load_suite(suite or DEFAULT_SUITE).tasks
        limits = {task.name: task.limit for task in listed}
        cards = find_tasks([task.name for task in listed])
        chosen = [Chosen(card, _smaller(limit, limits[card.name])) for card in cards]
    able, skipped = [], {}
    for item in chosen:
        status = status_of(item.card, data)
        if status.status == "runs":
            able.append(item)
        elif tasks:
            raise EvalError(f"task {item.card.name!r}: {status.status}: {status.reason}")
        else:
            skipped[item.card.name] = f"{status.status}: {status.reason}"
    if not able:
        raise EvalError("no task can run here:\n" + "\n".join(f"  {name}: {why}" for name, why in skipped.items()))
    return able, skipped


def _smaller(left: int | None, right: int | None) -> int | None:
    given = [value for value in (left, right) if value is not None]
    return min(given) if given else None


def evaluate(
    model: str | Path | LoadedModel,
    tasks: Sequence[str] | None = None,
    suite: str | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    numerics: str = "reference",
    data: str | Path | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    overwrite: bool = False,
    adapter: str | Path | None = None,
    deterministic: bool = False,
) -> dict[str, Any]:
    """Evaluates a model.

    Args:
        model: a model directory of any kind, or a loaded model.
        tasks: names of tasks; excludes `suite`.
        suite: name of a suite; `demo` if neither is given.
        out: directory for `results.json` and `samples/TASK.jsonl` (manifest kind `eval`); None: nothing is written.
        limit: only the first items of each task.
        batch_size: rows per forward pass; does not change the scores.
        numerics: class of quantized products.
        data: folder of item files that are not shipped.
        device: where the model runs.
        dtype: of weights and activations.
        overwrite: replace what is in `out`.
        adapter: a directory of low-rank updates, computed beside the model's weights.
        deterministic: forward passes of one shape, so that log-probabilities are the same bits at any batch size.

    Returns:
        The content of `results.json`.

    Raises:
        EvalError: unknown or impossible tasks.
        MissingExtra: lm-eval is not installed.
        CheckpointError: the model cannot be loaded.
    """
    chosen, skipped = choose(tasks, suite, limit, data)
    from hcx.kernels.registry import NUMERICS

    if numerics not in NUMERICS:
        raise EvalError(f"numerics = {numerics!r}; {did_you_mean(numerics, NUMERICS)}")
    directory = Path(model) if isinstance(model, (str, Path)) else Path(model.directory)
    settings = {
        "model": str(directory),
        "suite": None if tasks else (suite or DEFAULT_SUITE),
        "tasks": [item.card.name for item in chosen],
        "limit": limit,
        "batch_size": batch_size,
        "numerics": numerics,
        "device": device,
        "dtype": dtype,
        "adapter": None if adapter is None else str(adapter),
        "deterministic": deterministic,
    }
    if out is None:
        return _run(model, chosen, skipped, settings, data)[0]
    with new_artifact(out, KIND, settings, overwrite=overwrite) as writer:
        results, samples = _run(model, chosen, skipped, settings, data)
        (writer.path / "samples").mkdir()
        for name, rows in samples.items():
            path = writer.path / results["tasks"][name]["samples"]
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        writer.inputs.append(artifact_input("model", directory))
        if adapter is not None:
            writer.inputs.append(artifact_input("adapter", adapter))
        results["model_digest"] = writer.inputs[0].digest
        writer.counts.update(tasks=len(results["tasks"]), items=sum(len(rows) for rows in samples.values()))
        text = json.dumps(results, ensure_ascii=False, indent=1)
        (writer.path / "results.json").write_text(text + "\n", encoding="utf-8")
    return results


def _run(
    model: str | Path | LoadedModel,
    chosen: Sequence[Chosen],
    skipped: dict[str, str],
    settings: dict[str, Any],
    data: str | Path | None,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    translates = any(item.card.metadata.category == "translation" for item in chosen)
    # Asked for before the hours of work, not after.
    comet = chosen_scorer() if translates else None
    with quiet_lm_eval():
        from lm_eval.evaluator import evaluate as lm_evaluate

        from hcx.evals.lm import HcxLM

        lm = HcxLM(
            model,
            batch_size=settings["batch_size"],
            dtype=settings["dtype"],
            device=settings["device"],
            numerics=settings["numerics"],
            adapter=settings["adapter"],
            deterministic=settings["deterministic"],
        )
        directory = lm.loaded.tokenizer_directory
        chosen = with_sentinels(chosen, directory, skipped, named=settings["suite"] is None)
        runnable = [item.card for item in chosen if not is_judged(item.card)]
        loaded = load_tasks(runnable, str(directory), data)
        chosen = _that_fit(chosen, loaded, lm, skipped, named=settings["suite"] is None)
        items = {
            name: list(range(_smaller(item.limit, len(loaded.tasks[name].eval_docs)) or 0))
            for item in chosen
            for name in loaded.parts.get(item.card.name, ())
        }
        start = time.monotonic()
        found: dict[str, Any] = {}
        if loaded.tasks:
            found = lm_evaluate(
                lm=lm, task_dict=loaded.for_lm_eval(), samples=items, bootstrap_iters=0, log_samples=True
            )["samples"]
        judged = {
            item.card.name: run_judged(item.card, lm, data, item.limit) for item in chosen if is_judged(item.card)
        }
        seconds = time.monotonic() - start
    results: dict[str, Any] = {
        "version": 1,
        "model": settings["model"],
        "adapter": settings["adapter"],
        "numerics": settings["numerics"],
        "deterministic": settings["deterministic"],
        "suite": settings["suite"],
        "limit": settings["limit"],
        "seconds": round(seconds, 2),
        "tasks": {},
        "skipped": skipped,
        "not_scored": {"comet": WHY_NONE} if translates and comet is None else {},
    }
    samples = {}
    for item in chosen:
        name, meta = item.card.name, item.card.metadata
        if name in judged:
            metrics, samples[name], of = judged[name]
            count = len(samples[name])
        else:
            parts = {
                part: (loaded.tasks[part], sorted(found[part], key=lambda row: row["doc_id"]))
                for part in loaded.parts[name]
            }
            metrics, samples[name] = measure(item.card, parts, comet)
            of = sum(len(task.eval_docs) for task, _ in parts.values())
            count = sum(len({row["doc_id"] for row in rows}) for _, rows in parts.values())
        results["tasks"][name] = {
            "metrics": metrics,
            "language": meta.language,
            "category": meta.category,
            "version": meta.version,
            "protocol": meta.protocol,
            "shots": item.card.shots,
            "rows": list(meta.rows),
            "gap": meta.gap,
            "data": [
                {"path": d.path, "name": d.name, "revision": d.revision, "part": d.part}
                for d in loaded.datasets.get(name, ())
            ],
            "toxicity_scorer": scorer_identity() if "toxicity" in meta.needs else None,
            "judge": chosen_judge().identity if "judge" in meta.needs else None,
            "items": count,
            "of": of,
            "samples": f"samples/{name}.jsonl",
        }
    if settings["suite"] == REPORT_SUITE:
        averages = aggregate(report_scores(results["tasks"]))
        results["averages"] = {name: {"value": a.value, "missing": list(a.missing)} for name, a in averages.items()}
    return results, samples


def with_sentinels(chosen: Sequence[Chosen], directory: Path, skipped: dict[str, str], named: bool) -> Sequence[Chosen]:
    """All tasks, or those without infilling where the tokenizer has no tokens for it."""
    if named or all(item.card.metadata.layout is None for item in chosen):
        return chosen
    try:
        Sentinels.of(directory)
    except EvalError as error:
        skipped.update({i.card.name: f"unavailable: {error}" for i in chosen if i.card.metadata.layout is not None})
        return [item for item in chosen if item.card.metadata.layout is None]
    return chosen


def _that_fit(
    chosen: Sequence[Chosen], loaded: LoadedTasks, lm: HcxLM, skipped: dict[str, str], named: bool
) -> list[Chosen]:
    """The tasks whose answers fit the model; found out before hours of work, not after."""
    able = []
    for item in chosen:
        name = item.card.name
        tasks = [loaded.tasks[part] for part in loaded.parts.get(name, ())]
        longest = max((_longest_answer(task, item.limit, lm) for task in tasks), default=0)
        if longest < lm.max_length:
            able.append(item)
            continue
        reason = f"unavailable: answers take {longest} tokens, the model {lm.max_length} with the prompt"
        if named:
            raise EvalError(f"task {name!r}: {reason}")
        skipped[name] = reason
        loaded.drop(name)
    if not able:
        raise EvalError("no task can run:\n" + "\n".join(f"  {name}: {why}" for name, why in skipped.items()))
    return able


def _longest_answer(task: Any, limit: int | None, lm: HcxLM) -> int:
    """Tokens of the longest answer: what may be generated, or the longest option of the items that are asked."""
    if task.OUTPUT_TYPE == "generate_until":
        return int((task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks))
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    documents = islice(task.eval_docs, _smaller(limit, len(task.eval_docs)))
    options = {str(option) for document in documents for option in task.doc_to_choice(document)}
    return max((len(lm.tok_encode(option)) for option in options), default=0)


def check(tasks: Sequence[str] | None = None, data: str | Path | None = None) -> list[dict[str, Any]]:
    """Loads each task strictly, finds its items and builds one request, without a model.

    A task of ours whose data is not here is loaded on invented rows of its data set's schema; of lm-eval's own tasks
    the name is looked up. A task that does neither is `broken`: lm-eval itself would skip it in silence.

    Returns:
        One row per task: `name, status, reason, items, request`; `status` is `runs`, `needs-data`, `unavailable` or
        `broken`.
    """
    cards = find_tasks(tasks) if tasks else list(task_cards().values())
    return [_check(card, data) for card in cards]


def _check(card: TaskCard, data: str | Path | None) -> dict[str, Any]:
    status = status_of(card, data)
    row: dict[str, Any] = {
        "name": card.name,
        "status": status.status,
        "reason": status.reason,
        "items": None,
        "request": None,
    }
    if status.status == "unavailable" or is_judged(card):
        return row
    try:
        with quiet_lm_eval():
            logging.getLogger("hcx.evals.items").setLevel(logging.ERROR)
            if status.status == "runs":
                loaded = load_tasks([card], None, data)
                task = loaded.tasks[loaded.parts[card.name][0]]
                row["items"] = sum(len(loaded.tasks[part].eval_docs) for part in loaded.parts[card.name])
            elif card.is_ours:
                task = load_on_samples(card)
            else:
                name = str(card.benchmark.lm_eval) if card.benchmark is not None else card.name
                if name not in lm_eval_names():
                    raise EvalError(f"lm-eval has no task or group {name!r}; install lm-eval==0.4.13")
                return row
            task.build_all_requests(limit=1, rank=0, world_size=1)
            row["request"] = str(task.instances[0].args[0])[-200:]
    except Exception as error:
        row.update(status="broken", reason=f"{card.path}: {type(error).__name__}: {error}")
    return row


@cache
def lm_eval_names() -> frozenset[str]:
    """Every task and group that the installed lm-eval knows."""
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager().task_index)


def is_healthy(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether no checked task is broken."""
    return all(row["status"] != "broken" for row in rows)


def summary(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table that `hcx eval` ends with: task, metric, value, stderr, interval, items, mark."""
    rows: list[tuple[str, ...]] = []
    for name, task in results["tasks"].items():
        for metric_name, entry in task["metrics"].items():
            digits = 1 if task["category"] == "translation" else 3
            interval = entry["interval"]
            rows.append(
                (
                    name,
                    metric_name,
                    f"{entry['value']:.{digits}f}",
                    "" if entry["stderr"] is None else f"{entry['stderr']:.{digits}f}",
                    "" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}",
                    f"{entry['n']}" if task["items"] == task["of"] else f"{entry['n']} of {task['of']}",
                    _marks(task, entry),
                )
            )
    return rows


def _marks(task: dict[str, Any], entry: dict[str, Any]) -> str:
    marks = ["contains chance"] if entry["contains_chance"] else []
    if task.get("gap") and task.get("rows"):
        marks.append("not comparable with the report")
    marks += [str(d["part"]) for d in task.get("data", ()) if d["part"]]
    return "; ".join(marks)
