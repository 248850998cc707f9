"""Metrics with their errors, and the rows of the samples files, from lm-eval's records of each item."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hcx.evals.catalog import TaskCard
from hcx.evals.comet import TranslationScorer
from hcx.evals.scoring import likeliest
from hcx.evals.sources import DATA_SETS
from hcx.evals.statistics import Estimate, accuracy, bootstrap, ratio

Rows = Sequence[dict[str, Any]]
Measured = tuple[dict[str, Any], list[dict[str, Any]]]

SET_RESAMPLES = 200
"""For metrics of a whole set that lm-eval computes from all items: fewer, since each costs a pass over the items."""


def measure(card: TaskCard, parts: Mapping[str, tuple[Any, Rows]], comet: TranslationScorer | None = None) -> Measured:
    """Metrics and samples of a card.

    Args:
        card: the task.
        parts: name of each of its tasks -> (task object, lm-eval's records in the order of items).
        comet: a learned metric for translations.
    """
    if card.metadata.category == "translation":
        ((_, rows),) = parts.values()
        return translations(card, rows, comet)
    if card.metadata.source not in DATA_SETS:
        ((_, rows),) = parts.values()
        by_category = {"language modelling": documents, "knowledge": questions}
        return by_category[card.metadata.category](card, rows)
    return _any_task(parts)


def documents(card: TaskCard, rows: Rows) -> Measured:
    """Bits per byte of documents."""
    pairs = [row["bits_per_byte"] for row in rows]
    bits = [-logprob / math.log(2) for logprob, _ in pairs]
    sizes = [size for _, size in pairs]
    samples = [
        {"item": row["doc_id"], "bits": b, "bytes": size, "doc_hash": row["doc_hash"]}
        for row, b, size in zip(rows, bits, sizes, strict=True)
    ]
    return {"bits_per_byte": {**ratio(bits, sizes).to_json(), "bytes": sum(sizes)}}, samples


def questions(card: TaskCard, rows: Rows) -> Measured:
    """Accuracy of letters."""
    samples = []
    for row in rows:
        logprobs = [float(answer[0]) for answer in row["filtered_resps"]]
        samples.append(
            {
                "item": row["doc_id"],
                "subject": row["doc"].get("subject"),
                "gold": int(row["target"]),
                "chosen": likeliest(logprobs),
                "logprobs": logprobs,
                "correct": bool(row["acc"]),
                "doc_hash": row["doc_hash"],
            }
        )
    return {"acc": accuracy([float(row["acc"]) for row in rows], _chance(rows)).to_json()}, samples


def _chance(rows: Rows) -> float:
    return sum(1 / len(row["filtered_resps"]) for row in rows) / len(rows)


def translations(card: TaskCard, rows: Rows, comet: TranslationScorer | None = None) -> Measured:
    """chrF++ and BLEU of a set of segments, and the mean of a learned metric, times 100, where there is one."""
    from hcx.evals.translation_metrics import metric

    target = card.metadata.language.split("-")[1]
    tokenizer = {"ko": "char", "ja": "char", "zh": "zh"}.get(target, "13a")
    scorers = {"chrf++": metric("chrf++"), "bleu": metric("bleu", tokenizer)}
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
    if comet is not None:
        scores = comet.score([(s["source"], s["output"], s["reference"]) for s in samples])
        estimate = bootstrap(100 * np.asarray(scores), lambda part: float(part.mean()))
        metrics["comet"] = {**estimate.to_json(), "signature": comet.identity}
        samples = [{**sample, "comet": score} for sample, score in zip(samples, scores, strict=True)]
    return metrics, samples


def _any_task(parts: Mapping[str, tuple[Any, Rows]]) -> Measured:
    """Each metric over all items of all parts; beside it, for several parts, the mean of the parts."""
    metrics: dict[str, Any] = {}
    for label, name, filtered in _metrics(parts):
        by_part = {part: [row for row in rows if row["filter"] == filtered] for part, (_, rows) in parts.items()}
        aggregations = {part: parts[part][0].aggregation()[name] for part, rows in by_part.items() if rows}
        # An item that a metric does not score has None there; it is neither right nor wrong.
        items = [row for rows in by_part.values() for row in rows if row[name] is not None]
        estimate = _estimate(name, items, next(iter(aggregations.values()))) if items else None
        if estimate is None or not math.isfinite(estimate.value):
            # No item of the kind that it is defined on: no number, and not one that reads as a score.
            continue
        metrics[label] = estimate.to_json()
        if len(parts) > 1:
            means = [float(aggregations[part]([row[name] for row in rows])) for part, rows in by_part.items() if rows]
            macro = math.fsum(means) / len(means)
            if not math.isfinite(macro):
                continue
            metrics[f"{label}_macro"] = Estimate(
                macro, None, None, len(means), None, f"mean of {len(means)} parts"
            ).to_json()
    samples = [_sample(part, row) for part, (_, rows) in parts.items() for row in rows]
    return metrics, samples


def _metrics(parts: Mapping[str, tuple[Any, Rows]]) -> list[tuple[str, str, str]]:
    """(label, metric, filter) in the order of first appearance; the filter is named where there are several."""
    found: dict[tuple[str, str], None] = {}
    for _, rows in parts.values():
        for row in rows:
            found.update({(name, row["filter"]): None for name in row["metrics"]})
    several = len({filtered for _, filtered in found}) > 1
    return [(f"{name} ({filtered})" if several else name, name, filtered) for name, filtered in found]


def _estimate(name: str, rows: Rows, aggregation: Callable[[Any], float]) -> Estimate:
    values = [row[name] for row in rows]
    plain = all(isinstance(v, (int, float, np.number)) for v in values)
    is_mean = plain and math.isclose(float(aggregation(values)), math.fsum(map(float, values)) / len(values))
    if is_mean:
        numbers = [float(v) for v in values]
        if set(numbers) <= {0.0, 1.0}:
            chance = _chance(rows) if name in ("acc", "acc_norm") and _is_multiple_choice(rows) else None
            return accuracy(numbers, chance)
        return bootstrap(np.asarray(numbers), lambda part: float(part.mean()))
    estimate = bootstrap(
        np.arange(len(values)), lambda index: float(aggregation([values[i] for i in index])), SET_RESAMPLES
    )
    if name == "balanced_acc" and _is_multiple_choice(rows):
        return replace(estimate, chance=_chance(rows))
    return estimate


def _is_multiple_choice(rows: Rows) -> bool:
    return all(len(row["filtered_resps"]) > 1 and isinstance(row["filtered_resps"][0], (list, tuple)) for row in rows)


def _sample(part: str, row: dict[str, Any]) -> dict[str, Any]:
    sample = {"item": row["doc_id"], "task": part, "filter": row["filter"], "doc_hash": row["doc_hash"]}
    answers = row["filtered_resps"]
    if answers and isinstance(answers[0], (list, tuple)) and isinstance(answers[0][0], float):
        sample["logprobs"] = [float(answer[0]) for answer in answers]
        sample["gold"] = row["target"]
    else:
        sample["outputs"] = answers
    return {name: _plain(value) for name, value in {**sample, **{name: row[name] for name in row["metrics"]}}.items()}


def _plain(value: Any) -> Any:
    """What JSON can hold: lm-eval's predictions are numbers of numpy's."""
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
