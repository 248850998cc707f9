"""A comparison for people and for scripts: a Markdown table, CSV, JSON, and a picture per format with its optimum."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hcx.artifacts.manifest import write_atomically
from hcx.recipe.compare import RowResult, Spread

TABLE, ROWS, FACTS, PICTURE = "table.md", "table.csv", "comparison.json", "comparison.svg"
COLUMNS = (
    "method",
    "format",
    "held out, mean",
    "by part",
    "accuracy",
    "tasks",
    "learning rate",
    "seeds",
    "trained numbers",
    "optimizer bytes",
    "task bytes",
    "model bytes",
    "event share",
)
LOG_RANGE = 20
"""Varied values that span at least this factor are drawn on a logarithmic axis."""


def write_comparison(results: Sequence[RowResult], out: Path, name: str) -> None:
    """Writes `table.md`, `table.csv`, `comparison.json` and, where something was measured, `comparison.svg`."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells).replace("\n", " ") + " |" for cells in table_rows(results)]
    protocol = _protocol(results)
    write_atomically(out / TABLE, ("\n".join([f"# {name}", "", *lines, "", protocol]) + "\n").encode())
    flat = [_flat(result) for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in flat for key in row)), restval="")
    writer.writeheader()
    writer.writerows(flat)
    write_atomically(out / ROWS, text.getvalue().encode())
    facts = {
        "name": name,
        "protocol": protocol,
        "rows": [_plain(asdict(result)) for result in results],
        "columns": COLUMNS,
        "cells": table_rows(results),
    }
    write_atomically(out / FACTS, (json.dumps(facts, ensure_ascii=False, indent=1) + "\n").encode())
    if any(result.mean is not None for result in results):
        _draw(results, out / PICTURE)


def table_rows(results: Sequence[RowResult]) -> list[tuple[str, ...]]:
    """The cells of the table, as `COLUMNS` names them; the lowest mean of each format is marked with a star."""
    best = {result.row.format: result for result in sorted(_measured(results), key=_mean, reverse=True)}
    rows = []
    for result in results:
        if result.mean is None or result.figures is None:
            blank = [""] * (len(COLUMNS) - 3)
            rows.append((result.row.label, result.row.format, f"failed: {result.problem}", *blank))
            continue
        figures, star = result.figures, " *" if best[result.row.format] is result else ""
        rows.append(
            (
                result.row.label,
                result.row.format,
                _spread(result.mean) + star,
                "; ".join(f"{part} {spread.mean:.4f}" for part, spread in (result.held_out or {}).items()),
                "; ".join(f"{part} {spread.mean:.1%}" for part, spread in (result.accuracy or {}).items()),
                "; ".join(f"{task} {_spread(spread, 2)}" for task, spread in (result.tasks or {}).items()),
                _rate(result),
                str(result.seeds),
                f"{figures.trained_numbers:,}",
                f"{figures.optimizer_bytes:,}",
                f"{figures.task_bytes:,}",
                f"{figures.model_bytes:,}",
                "" if result.event_share is None else f"{result.event_share:.2%}",
            )
        )
    return rows


def _protocol(results: Sequence[RowResult]) -> str:
    measured = _measured(results)
    unit = measured[0].figures.unit.replace("_", " ") if measured and measured[0].figures else "figure"
    return (
        f"Held out: {unit}, mean over parts and seeds (standard deviation over seeds); lower is better, * is the "
        "lowest of its format. Learning rates were chosen per row on the same held-out text with the first seed (edge: "
        "the best was the smallest or largest tried). Every "
        "model was scored from its files, in fp32, by the reference kernels. Optimizer bytes: state beside the fp32 "
        "masters, as in the checkpoint. Task bytes: weight files beside the model that training started from, or the "
        "whole model where the method ends in one of its own. Event share: seconds of regularisation events over those "
        "of the other work."
    )


def _measured(results: Sequence[RowResult]) -> list[RowResult]:
    return [result for result in results if result.mean is not None]


def _mean(result: RowResult) -> float:
    return math.inf if result.mean is None else result.mean.mean


def _spread(spread: Spread, digits: int = 4) -> str:
    told = f"{spread.mean:.{digits}f}"
    return told if math.isnan(spread.deviation) else f"{told} ({spread.deviation:.{digits}f})"


def _rate(result: RowResult) -> str:
    """The chosen learning rate, and whether a better one may lie beyond those that were tried."""
    if result.lr is None:
        return ""
    tried = [float(rate) for rate in result.tried or {}]
    return f"{result.lr:g}" + (" (edge)" if len(tried) > 1 and result.lr in (min(tried), max(tried)) else "")


def _flat(result: RowResult) -> dict[str, Any]:
    row: dict[str, Any] = {"method": result.row.method, "format": result.row.format, **dict(result.row.values)}
    row |= {"lr": result.lr, "seeds": result.seeds, "problem": result.problem, "event_share": result.event_share}
    spreads: dict[str, Spread] = {} if result.mean is None else {"mean": result.mean}
    for kind, found in (("held_out", result.held_out), ("accuracy", result.accuracy), ("task", result.tasks)):
        spreads |= {f"{kind} {part}": spread for part, spread in (found or {}).items()}
    for name, spread in spreads.items():
        row |= {f"{name} {key}": value for key, value in asdict(spread).items()}
    if result.figures is not None:
        counts = ("unit", "trained_numbers", "optimizer_bytes", "task_bytes", "model_bytes", "train_seconds")
        row |= {name: getattr(result.figures, name) for name in counts}
    return row


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(results: Sequence[RowResult], path: Path) -> None:
    formats = list(dict.fromkeys(result.row.format for result in _measured(results)))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hcx", "font.size": 10}):
        figure = Figure(figsize=(6.5, 3.6 * len(formats)), layout="constrained")
        for axes, name in zip(figure.subplots(len(formats), squeeze=False)[:, 0], formats, strict=True):
            mine = [result for result in _measured(results) if result.row.format == name]
            varied = [result for result in mine if len(result.row.values) == 1 and _is_number(result.row.values[0][1])]
            if varied:
                _curve(axes, varied, [result for result in mine if result not in varied])
            else:
                _points(axes, mine)
            axes.set_title(name)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _curve(axes: Axes, varied: Sequence[RowResult], others: Sequence[RowResult]) -> None:
    """Held-out figure over what is varied, one line per method; methods that vary nothing are level lines."""
    places: list[float] = []
    for method in dict.fromkeys(result.row.method for result in varied):
        line = sorted((r for r in varied if r.row.method == method), key=lambda r: float(r.row.values[0][1]))
        xs = [float(result.row.values[0][1]) for result in line]
        places += xs
        axes.errorbar(xs, [_mean(r) for r in line], yerr=_errors(line), marker="o", capsize=3, label=method)
    best = min(varied, key=_mean)
    where = [float(best.row.values[0][1])]
    axes.plot(where, [_mean(best)], marker="*", markersize=15, linestyle="", color="black", label="lowest")
    for number, result in enumerate(others):
        style = ("--", ":", "-.")[number % 3]
        axes.axhline(_mean(result), linestyle=style, color=f"C{number + 3}", label=result.row.label)
        if result.mean is not None and result.mean.high > result.mean.low:
            axes.axhspan(result.mean.low, result.mean.high, color=f"C{number + 3}", alpha=0.15)
    if min(places) > 0 and max(places) / min(places) >= LOG_RANGE:
        axes.set_xscale("log")
    ticks = sorted(set(places))
    axes.set_xticks(ticks, [f"{place:g}" for place in ticks])
    axes.minorticks_off()
    axes.set_xlabel(varied[0].row.values[0][0])
    axes.set_ylabel(f"held out, {varied[0].figures.unit.replace('_', ' ')}" if varied[0].figures else "held out")
    axes.legend(fontsize=8)


def _points(axes: Axes, results: Sequence[RowResult]) -> None:
    """One point with its spread per row, best marked."""
    ys = list(range(len(results)))[::-1]
    axes.errorbar([_mean(result) for result in results], ys, xerr=_errors(results), fmt="o", capsize=3)
    best = min(range(len(results)), key=lambda index: _mean(results[index]))
    axes.plot([_mean(results[best])], [ys[best]], marker="*", markersize=15, linestyle="", color="black")
    axes.set_yticks(ys, [result.row.label for result in results])
    axes.set_xlabel(f"held out, {results[0].figures.unit.replace('_', ' ')}" if results[0].figures else "held out")
    axes.margins(y=0.15)


def _errors(results: Sequence[RowResult]) -> list[float] | None:
    deviations = [math.nan if result.mean is None else result.mean.deviation for result in results]
    return None if all(map(math.isnan, deviations)) else [0.0 if math.isnan(d) else d for d in deviations]
