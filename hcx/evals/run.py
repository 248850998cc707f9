"""From a model directory and task names to `results.json`: scores with standard errors, intervals and chance."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcx.artifacts import artifact_input, new_artifact
from hcx.errors import EvalError, MissingExtra, did_you_mean
from hcx.evals.catalog import TaskCard, find_tasks, is_installed, load_suite, status_of, task_cards, tasks_directory
from hcx.evals.statistics import Estimate, accuracy, bootstrap, ratio

if TYPE_CHECKING:
    from hcx.model.load import LoadedModel

KIND = "eval"
DEFAULT_SUITE = "demo"


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
    if tasks and suite:
        raise EvalError("give either tasks or a suite, not both")
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
        )
        loaded = load_tasks([item.card for item in chosen], str(lm.loaded.tokenizer_directory), data)
        chosen = _that_fit(chosen, loaded, lm.max_length, skipped, named=settings["suite"] is None)
        items = {
            item.card.name: list(range(_smaller(item.limit, len(loaded["tasks"][item.card.name].eval_docs)) or 0))
            for item in chosen
        }
        start = time.monotonic()
        found = lm_evaluate(lm=lm, task_dict=loaded, samples=items, bootstrap_iters=0, log_samples=True)
        seconds = time.monotonic() - start
    results: dict[str, Any] = {
        "version": 1,
        "model": settings["model"],
        "adapter": settings["adapter"],
        "numerics": settings["numerics"],
        "suite": settings["suite"],
        "limit": settings["limit"],
        "seconds": round(seconds, 2),
        "tasks": {},
        "skipped": skipped,
    }
    samples = {}
    for item in chosen:
        name, meta = item.card.name, item.card.metadata
        rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
        metrics, samples[name] = measure(item.card, rows)
        results["tasks"][name] = {
            "metrics": metrics,
            "language": meta.language,
            "category": meta.category,
            "version": meta.version,
            "protocol": meta.protocol,
            "items": len(rows),
            "of": len(loaded["tasks"][name].eval_docs),
            "samples": f"samples/{name}.jsonl",
        }
    return results, samples


def _that_fit(
    chosen: Sequence[Chosen], loaded: Any, max_length: int, skipped: dict[str, str], named: bool
) -> list[Chosen]:
    """The tasks whose answers fit the model; found out before hours of work, not after."""
    able = []
    for item in chosen:
        name = item.card.name
        limit = int((loaded["tasks"][name].config.generation_kwargs or {}).get("max_gen_toks", 0))
        if limit < max_length:
            able.append(item)
            continue
        reason = f"unavailable: answers take {limit} tokens, the model {max_length} with the prompt"
        if named:
            raise EvalError(f"task {name!r}: {reason}")
        skipped[name] = reason
        del loaded["tasks"][name]
    if not able:
        raise EvalError("no task can run:\n" + "\n".join(f"  {name}: {why}" for name, why in skipped.items()))
    return able


def load_tasks(cards: Sequence[TaskCard], model_directory: str | None, data: str | Path | None) -> Any:
    """lm-eval's task objects of some tasks, with what their items need to know about the model."""
    from lm_eval.tasks import TaskManager

    metadata = {
        "pretrained": model_directory,
        "data": None if data is None else str(data),
    }
    manager = TaskManager(include_path=str(tasks_directory()), include_defaults=False, metadata=metadata)
    return manager.load([card.name for card in cards])


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
    from tqdm import tqdm

    # Bars that lm-eval offers no switch for; those with a switch are switched off where they are called.
    shown = tqdm.__init__
    tqdm.__init__ = partialmethod(shown, disable=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = shown  # type: ignore[method-assign]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def measure(card: TaskCard, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics with their errors, and the rows of the samples file, from lm-eval's per-item records."""
    by_category = {"language modelling": _documents, "knowledge": _questions, "translation": _translations}
    return by_category[card.metadata.category](card, rows)


def _documents(card: TaskCard, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    import math

    pairs = [row["bits_per_byte"] for row in rows]
    bits = [-logprob / math.log(2) for logprob, _ in pairs]
    sizes = [size for _, size in pairs]
    samples = [
        {"item": row["doc_id"], "bits": b, "bytes": size, "doc_hash": row["doc_hash"]}
        for row, b, size in zip(rows, bits, sizes, strict=True)
    ]
    return {"bits_per_byte": {**ratio(bits, sizes).to_json(), "bytes": sum(sizes)}}, samples


def _questions(card: TaskCard, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    samples = []
    for row in rows:
        logprobs = [float(answer[0]) for answer in row["filtered_resps"]]
        samples.append(
            {
                "item": row["doc_id"],
                "subject": row["doc"].get("subject"),
                "gold": int(row["target"]),
                "chosen": max(range(len(logprobs)), key=logprobs.__getitem__),
                "logprobs": logprobs,
                "correct": bool(row["acc"]),
                "doc_hash": row["doc_hash"],
            }
        )
    chance = sum(1 / len(sample["logprobs"]) for sample in samples) / len(samples)
    return {"acc": accuracy([float(row["acc"]) for row in rows], chance).to_json()}, samples


def _translations(card: TaskCard, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from hcx.evals.translation_metrics import metric

    target = card.metadata.language.split("-")[1]
    scorers = {"chrf++": metric("chrf++"), "bleu": metric("bleu", "char" if target == "ko" else "13a")}
    metrics = {}
    for name, scorer in scorers.items():
        estimate: Estimate = bootstrap(scorer.counts([tuple(row[name]) for row in rows]), scorer.score)
        metrics[name] = {**estimate.to_json(), "signature": scorer.signature}
    samples = [
        {
            "item": row["doc_id"],
            "source": row["doc"]["source"],
            "reference": row["doc"]["reference"],
            "output": row["chrf++"][1],
        }
        for row in rows
    ]
    return metrics, samples


def check(tasks: Sequence[str] | None = None, data: str | Path | None = None) -> list[dict[str, Any]]:
    """Loads each task, finds its items and builds one request, without a model.

    Returns:
        One row per task: `name, status, reason, items, request`; `status` is `runs` where all of that worked.
    """
    cards = find_tasks(tasks) if tasks else list(task_cards().values())
    rows = []
    for card in cards:
        status = status_of(card, data)
        row: dict[str, Any] = {
            "name": card.name,
            "status": status.status,
            "reason": status.reason,
            "items": None,
            "request": None,
        }
        if status.status == "runs":
            with quiet_lm_eval():
                logging.getLogger("hcx.evals.items").setLevel(logging.ERROR)
                task = load_tasks([card], None, data)["tasks"][card.name]
                task.build_all_requests(limit=1, rank=0, world_size=1)
                row["items"] = len(task.eval_docs)
                row["request"] = str(task.instances[0].args[0])[-200:]
        rows.append(row)
    return rows


def is_healthy(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether every checked task runs."""
    return all(row["status"] == "runs" for row in rows)


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
                    "contains chance" if entry["contains_chance"] else "",
                )
            )
    return rows
