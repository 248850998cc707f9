"""The picture of `hcx bench kernels`: each contender's fraction of the memory bound, and its rate against the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from hcx.errors import DataError

OURS, PEER = "#1f6f54", "#b9b9b4"


def plot_kernels(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes an SVG of two panels, from rows as `hcx bench kernels` writes them.

    The memory bound of a contender is the time of reading its own bytes at the best rate that the same comparison read
    with. Left: that, for a batch of 1. Right: products of weight and activation per second, of every contender that was
    measured at several batches.

    Args:
        rows: mappings from column to text or number. Used are those with weights from memory of the device that was
            measured last; on a CPU those of one thread.
        path: of the file.

    Raises:
        DataError: no row can be drawn.
    """
    device = rows[-1]["device"] if rows else ""
    used = [row for row in rows if row["device"] == device and int(row["threads"]) <= 1 and row["weights"] == "memory"]
    shapes = [(int(row["out"]), int(row["in"])) for row in used]
    if not shapes:
        raise DataError("no row has one thread and weights from memory: nothing to draw")
    shape = max(set(shapes), key=shapes.count)
    used = [row for row, found in zip(used, shapes, strict=True) if found == shape]
    bound = {
        batch: _rate(row for row in used if int(row["batch"]) == batch) for batch in {int(r["batch"]) for r in used}
    }
    if None in bound.values():
        raise DataError("a comparison without a floor: rows of hcx bench kernels have one for each of our kernels")

    def fraction(row: Mapping[str, Any]) -> float:
        return float(row["size_bytes"]) / (bound[int(row["batch"])] or 1.0) / float(row["us_p2"])

    def rate(row: Mapping[str, Any]) -> float:
        return shape[0] * shape[1] * int(row["batch"]) / float(row["us_p2"]) / 1e3

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hcx", "font.size": 10}):
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        single = sorted((row for row in used if int(row["batch"]) == 1), key=fraction)
        names = [_name(row) for row in single]
        left.barh(names, [fraction(row) for row in single], color=[OURS if _is_ours(row) else PEER for row in single])
        left.axvline(1, color="black", linewidth=0.8)
        left.set_xlabel("fraction of the memory bound of its own bytes")
        left.set_title(f"{shape[0]} x {shape[1]}, batch 1, {device}", loc="left")
        ends: list[tuple[str, int, float]] = []
        for name in sorted({_name(row) for row in used}):
            own = sorted((row for row in used if _name(row) == name), key=lambda row: int(row["batch"]))
            if len({row["batch"] for row in own}) < 2:
                continue
            color = OURS if _is_ours(own[0]) else PEER
            batches = [int(row["batch"]) for row in own]
            right.plot(batches, [rate(row) for row in own], "o-", color=color, markersize=4)
            ends.append((name, batches[-1], rate(own[-1])))
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        for (name, batch, end), place in zip(ends, apart([end for *_, end in ends]), strict=True):
            right.annotate(name, (batch, end), (batch * 1.15, place), fontsize=7, va="center")
        right.set_xlabel("batch")
        right.set_title("billions of weight x activation per second", loc="left")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def apart(values: Sequence[float], factor: float = 1.11) -> list[float]:
    """Places for labels on a logarithmic axis: in their points' order, each at least `factor` above the last."""
    places = [0.0] * len(values)
    lowest = 0.0
    for number in sorted(range(len(values)), key=lambda number: values[number]):
        places[number] = lowest = max(values[number], lowest * factor)
    return places


def _rate(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The best rate of reading, in bytes per microsecond."""
    rates = [float(row["size_bytes"]) / float(row["floor_us_p2"]) for row in rows if row["floor_us_p2"]]
    return max(rates, default=None)


def _is_ours(row: Mapping[str, Any]) -> bool:
    return str(row["kernel"]).startswith(("cpu-", "biqgemm", "triton", "lut"))


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['kernel']}, {float(row['bits']):g} bits" if _is_ours(row) else str(row["kernel"])
