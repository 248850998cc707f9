"""Figures as inline SVG that take their fonts and colours from the page.

Text stays text (`svg.fonttype: none`), so Korean renders with the page's fonts. Colours are drawn with sentinel values
and replaced by CSS variables, so one figure serves the light, the dark and the printed page.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050501", "#050502", "#050503", "#050504")
_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--line", PAPER: "--card"} | {
    sentinel: f"--s{number}" for number, sentinel in enumerate(SERIES, 1)
}
SERIES_OF = {"ko": SERIES[0], "en": SERIES[1], "code": SERIES[2]}
"""One colour per language on every figure of the page."""
MARKERS = {"ko": "o", "en": "s", "code": "D"}
"""One marker per language, so that colour is never the only difference."""

SIZE = (5.9, 3.9)
"""Inches at 72 dpi: small enough that text stays readable when a phone shrinks the figure to its width."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hcx",
    "font.size": 12,
    "font.family": "sans-serif",
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
}


@contextmanager
def _canvas(title: str, x: str, y: str) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=SIZE, dpi=72)
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield figure, axes


def _svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The metrics of a missing glyph only move a label by a pixel; the page's own font draws it.
        warnings.simplefilter("ignore")
        previous = logging.getLogger("matplotlib.font_manager").level
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        logging.getLogger("matplotlib.font_manager").setLevel(previous)
    return _for_page(buffer.getvalue(), description)


def _for_page(svg: str, description: str) -> str:
    """Makes a standalone SVG fit for inlining: unique ids, no fixed size, the page's fonts and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # From the content: ids differ between the figures of a page, and the same evidence gives the same page.
    prefix = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)([^")]+)', rf"\1{prefix}\2", svg)
    svg = re.sub(r'font: (?:(?:bold|\d{3}) )?([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    for sentinel, variable in _VARIABLES.items():
        svg = svg.replace(sentinel, f"var({variable})")
    label = escape(description, quote=True)
    return re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start."""
    average, mass, result = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        result.append(average / mass)
    return result


def loss_curve(steps: Sequence[float], losses: Sequence[float]) -> str:
    """Training loss per step, with its moving average."""
    with _canvas("Training loss", "optimizer step", "nats per token") as (figure, axes):
        axes.plot(steps, losses, color=FAINT, linewidth=0.8, alpha=0.45)
        if len(losses) > 20:
            axes.plot(steps, smooth(losses, min(0.95, 1 - 10 / len(losses))), color=SERIES[0])
        _margins(axes, losses[len(losses) // 20 :] or losses)
        description = f"Training loss over {len(steps)} steps, from {losses[0]:.2f} to {losses[-1]:.2f} nats per token"
        return _svg(figure, description)


def _legend(figure: Figure, axes: Axes) -> None:
    # Below the axes: inside, it would lie on the curves of one run or another.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, columnspacing=1.2)


def _margins(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low or 1.0)
    axes.set_ylim(low - pad, high + pad)
    axes.margins(x=0.02)


def bits_per_byte_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    baseline: Mapping[str, float],
    names: Mapping[str, str],
    baseline_name: str,
) -> str:
    """Held-out bits per byte of each language during training; the baseline as dashed lines."""
    with _canvas("Held-out bits per byte", "optimizer step", "bits per byte") as (figure, axes):
        for language, (steps, values) in curves.items():
            colour = SERIES_OF.get(language, SERIES[3])
            axes.plot(
                steps,
                values,
                color=colour,
                marker=MARKERS.get(language, "^"),
                markersize=5,
                label=names.get(language, language),
            )
            if language in baseline:
                axes.axhline(baseline[language], color=colour, linestyle=(0, (5, 3)), linewidth=1.2)
        if any(language in baseline for language in curves):
            axes.plot([], [], color=FAINT, linestyle=(0, (5, 3)), linewidth=1.2, label=baseline_name)
        _legend(figure, axes)
        axes.margins(x=0.03)
        ends = ", ".join(f"{names.get(k, k)} {v[-1]:.2f}" for k, (_, v) in curves.items())
        return _svg(figure, f"Held-out bits per byte by language during training; at the end {ends}")


def shares(planned: Mapping[str, float], realised: Mapping[str, float], names: Mapping[str, str]) -> str:
    """Planned and realised share of each language in the training tokens."""
    with _canvas("Shares of the training tokens", "share", "") as (figure, axes):
        keys = [key for key in names if key in planned or key in realised]
        keys += [key for key in realised if key not in names]
        for row, key in enumerate(keys):
            colour = SERIES_OF.get(key, SERIES[3])
            if key in realised:
                axes.barh(row + 0.0, realised[key], height=0.46, color=colour)
                axes.text(realised[key] + 0.012, row, f"{realised[key]:.1%}", va="center", color=INK)
            if key in planned:
                axes.plot([planned[key]] * 2, [row - 0.34, row + 0.34], color=INK, linewidth=2)
        axes.set_yticks(range(len(keys)), [names.get(key, key) for key in keys])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlim(0, max([*planned.values(), *realised.values(), 0.1]) * 1.22)
        told = ", ".join(f"{names.get(key, key)} {realised.get(key, 0):.1%}" for key in keys)
        return _svg(figure, f"Realised shares of the training tokens: {told}")


def against_bits(
    title: str,
    y: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    full: Mapping[str, float],
    names: Mapping[str, str],
    log: bool = False,
) -> str:
    """A quality figure of each language against bits per weight; full precision as dotted lines."""
    with _canvas(title, "bits per weight, scales included", y) as (figure, axes):
        for language, pairs in points.items():
            colour = SERIES_OF.get(language, SERIES[3])
            xs, ys = zip(*sorted(pairs), strict=True)
            axes.plot(
                xs,
                ys,
                color=colour,
                marker=MARKERS.get(language, "^"),
                markersize=6,
                label=names.get(language, language),
            )
            if language in full:
                axes.axhline(full[language], color=colour, linestyle=(0, (1, 2)), linewidth=1.4)
        if full:
            axes.plot([], [], color=FAINT, linestyle=(0, (1, 2)), linewidth=1.4, label="full precision")
        if log and all(value > 0 for pairs in points.values() for _, value in pairs):
            axes.set_yscale("log")
        _legend(figure, axes)
        axes.margins(x=0.05)
        told = "; ".join(
            f"{names.get(k, k)}: " + ", ".join(f"{b:.2f} bits {v:.3g}" for b, v in sorted(p)) for k, p in points.items()
        )
        return _svg(figure, f"{title} against bits per weight. {told}")


def throughput(steps: Sequence[float], values: Sequence[float]) -> str:
    """Training tokens per second over the run."""
    with _canvas("Training throughput", "optimizer step", "tokens per second") as (figure, axes):
        axes.plot(steps, values, color=SERIES[3], linewidth=1.2)
        axes.set_ylim(0, max(values) * 1.15)
        axes.margins(x=0.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        middle = sorted(values)[len(values) // 2]
        return _svg(figure, f"Training throughput, median {middle:,.0f} tokens per second")


def by_sublayer(title: str, y: str, values: Sequence[float], log: bool = False) -> str:
    """A figure of every residual sublayer in forward order, attention and MLP told apart."""
    with _canvas(title, "block", y) as (figure, axes):
        for kind, (name, colour, marker) in enumerate((("attention", SERIES[0], "o"), ("MLP", SERIES[1], "s"))):
            xs = [index / 2 for index in range(kind, len(values), 2)]
            axes.vlines(xs, 0 if not log else min(values), values[kind::2], color=colour, linewidth=1.2)
            axes.plot(xs, values[kind::2], color=colour, marker=marker, markersize=5, linestyle="none", label=name)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, max([*values, 1e-12]) * 1.12)
        _legend(figure, axes)
        axes.margins(x=0.03)
        told = ", ".join(f"{value:.3g}" for value in values)
        return _svg(figure, f"{title} of each sublayer, attention and MLP by turns: {told}")


def curves(title: str, x: str, y: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Named curves of one quantity over another."""
    styles = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
    with _canvas(title, x, y) as (figure, axes):
        for number, (name, (xs, ys)) in enumerate(lines.items()):
            style = styles[number // len(SERIES) % len(styles)]
            axes.plot(xs, ys, color=SERIES[number % len(SERIES)], linestyle=style, marker="o", markersize=4, label=name)
        _legend(figure, axes)
        axes.margins(x=0.03)
        ends = ", ".join(f"{name} {ys[-1]:.4g}" for name, (_, ys) in lines.items())
        return _svg(figure, f"{title}; at the end {ends}")


def standalone(svg: str, names: Mapping[str, str] | None = None) -> str:
    """A figure of the page as a file of its own: the page's variables become colours that suit white paper."""
    light = {
        "--ink": "#1c1c1c",
        "--faint": "#5c5c5c",
        "--line": "#d9d9d9",
        "--card": "#ffffff",
        "--s1": "#1f6feb",
        "--s2": "#c2410c",
        "--s3": "#15803d",
        "--s4": "#7c3aed",
        **(names or {}),
    }
    for variable, colour in light.items():
        svg = svg.replace(f"var({variable})", colour)
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)
