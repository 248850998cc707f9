"""The picture of a search: a curve over one field, a surface over two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hcx.errors import DataError
from hcx.recipe.tune import TrialResult

Value = bool | int | float | str


def plot_search(trials: Sequence[TrialResult], path: Path, score: str) -> None:
    """Writes an SVG of the first two fields; of further ones, the best trial at each point is drawn.

    Args:
        trials: of one search.
        path: of the file.
        score: what the values are, for the axis.

    Raises:
        DataError: no trial has a score.
    """
    good = [trial for trial in trials if trial.scores]
    if not good:
        raise DataError("no trial has a score: nothing to draw")
    names = list(good[0].values)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hcx", "font.size": 10}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        if len(names) == 1:
            _curve(axes, good, names[0], score)
        else:
            _surface(figure, axes, good, names[0], names[1], score)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _best(trials: Sequence[TrialResult], names: Sequence[str]) -> dict[tuple[Value, ...], TrialResult]:
    """The best trial for each combination of these fields."""
    found: dict[tuple[Value, ...], TrialResult] = {}
    for trial in trials:
        point = tuple(trial.values[name] for name in names)
        if point not in found or trial.mean < found[point].mean:
            found[point] = trial
    return found


def _order(values: Sequence[Value]) -> list[Value]:
    """Numbers by size, then texts."""
    return sorted(set(values), key=lambda value: (isinstance(value, str), value if not isinstance(value, str) else 0.0))


def _curve(axes: Axes, trials: Sequence[TrialResult], name: str, score: str) -> None:
    points = {point[0]: trial for point, trial in _best(trials, [name]).items()}
    values = _order(list(points))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = [float(value) for value in values] if numeric else [float(n) for n in range(len(values))]
    spreads = [points[value].spread for value in values]
    axes.errorbar(
        places,
        [points[value].mean for value in values],
        yerr=None if any(map(math.isnan, spreads)) else spreads,
        marker="o",
        capsize=3,
    )
    if numeric and min(places) > 0 and max(places) / min(places) >= 20:
        axes.set_xscale("log")
    axes.set_xticks(places, [f"{value}" for value in values] if len(values) <= 8 else None)
    axes.set_xlabel(name)
    axes.set_ylabel(score)


def _surface(figure: Figure, axes: Axes, trials: Sequence[TrialResult], x: str, y: str, score: str) -> None:
    points = _best(trials, [x, y])
    columns, rows = _order([point[0] for point in points]), _order([point[1] for point in points])
    if len(columns) * len(rows) <= 4 * len(points):
        table = [
            [points[column, row].mean if (column, row) in points else math.nan for column in columns] for row in rows
        ]
        image: Any = axes.imshow(table, cmap="viridis_r", aspect="auto", origin="lower")
        for (column, row), trial in points.items():
            text = f"{trial.mean:.4g}" + ("" if math.isnan(trial.spread) else f"\n\u00b1{trial.spread:.2g}")
            axes.text(columns.index(column), rows.index(row), text, ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(columns)), [str(value) for value in columns])
        axes.set_yticks(range(len(rows)), [str(value) for value in rows])
    else:  # drawn from ranges: no two points share a value
        image = axes.scatter(
            [float(point[0]) for point in points],
            [float(point[1]) for point in points],
            c=[trial.mean for trial in points.values()],
            cmap="viridis_r",
        )
    figure.colorbar(image, ax=axes, label=score)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
