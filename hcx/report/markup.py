"""Pieces of HTML that the sections are made of. Titles, heads and tags are escaped here; cells and bodies are HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from hcx.report.schema import LANGUAGES, Measure


def section(title: str, lead: str, body: str, tag: str = "") -> str:
    """A titled block; `lead` and `body` are HTML."""
    label = f'<span class="tag">{escape(tag)}</span>' if tag else ""
    return f'<section>\n<h2>{escape(title)} {label}</h2>\n<p class="lead">{lead}</p>\n{body}\n</section>'


def absent(title: str, how: str) -> str:
    """A block that says that there is no evidence for it, and what would make it."""
    return section(title, f'<span class="none">Nothing was found.</span> {escape(how)}', "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    """A table that scrolls by itself on a narrow screen; the first column stays in view."""

    def cell(tag: str, column: int, value: str) -> str:
        return f"<{tag}{' class=text' if column in text_columns else ''}>{value}</{tag}>"

    top = "".join(cell("th", column, escape(name)) for column, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(cell("td", column, value) for column, value in enumerate(row)) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def figure(svg: str, caption: str) -> str:
    """An inline SVG with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def figures(*found: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures">{"".join(found)}</div>' if found else ""


def bullets(points: Iterable[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>"


def language_name(language: str) -> str:
    """How people call a language key."""
    return LANGUAGES.get(language, language)


def in_order(languages: Iterable[str]) -> list[str]:
    """Language keys in the order of display, unknown ones last."""
    found = list(dict.fromkeys(languages))
    return [*(key for key in LANGUAGES if key in found), *(key for key in found if key not in LANGUAGES)]


def megabytes(count: float) -> str:
    """Bytes as MB (10^6)."""
    return f"{count / 1e6:,.2f} MB"


def measure(value: Measure | None, digits: int = 3) -> str:
    """A figure with its interval below it; a dash where nothing was measured."""
    if value is None:
        return '<span class="faint">-</span>'
    if value.low is None or value.high is None:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f}<small>{value.low:.{digits}f} to {value.high:.{digits}f}</small>"
