"""The page of `hcx tokenizer report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from hcx.artifacts import new_artifact
from hcx.report.markup import bullets, section, table
from hcx.report.page import page
from hcx.tokenizer.report import BoundaryRow, ReportRow

DOMAINS = {"in": "held-out text of the kind that ships with hcx", "out": "text of other kinds"}


@dataclass(frozen=True)
class TokenizerReport:
    """Everything that the command measured.

    Attributes:
        compression: one row for each tokenizer and text.
        boundaries: one row for each tokenizer and judge.
        unavailable: what could not be measured, and why.
        sources: tokenizer -> the file it was read from.
    """

    compression: Sequence[ReportRow]
    boundaries: Sequence[BoundaryRow] = ()
    unavailable: Sequence[str] = ()
    sources: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> list[dict[str, Any]]:
        """For `--json` and `report.json`: rows, each with the `kind` of what it holds."""
        return [
            *({"kind": "compression", **row.to_json()} for row in self.compression),
            *({"kind": "boundaries", **row.to_json()} for row in self.boundaries),
            *({"kind": "source", "tokenizer": name, "source": path} for name, path in self.sources.items()),
            *({"kind": "unavailable", "reason": reason} for reason in self.unavailable),
        ]


def write_tokenizer_report(report: TokenizerReport, out: str | Path) -> Path:
    """Writes `OUT/index.html` and `OUT/report.json`, replacing an older report.

    Raises:
        HcxError: `out` is something else than a report.
    """
    out = Path(out)
    replaces = (out / "index.html").is_file()
    with new_artifact(out, "report", {"tokenizers": list(report.sources)}, overwrite=replaces) as artifact:
        content = json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n"
        (artifact.path / "report.json").write_text(content, encoding="utf-8")
        (artifact.path / "index.html").write_text(render_tokenizers(report), encoding="utf-8")
    return out / "index.html"


def render_tokenizers(report: TokenizerReport) -> str:
    """The whole page as one string: no script, no request to anywhere."""
    header = (
        '<header><h1>Tokenizers side by side</h1><p class="lead">'
        f"{len(report.sources)} tokenizers on the same text, measured by hcx.</p></header>"
    )
    compact = "Higher is more compact: more text fits a context, and fewer steps write an answer."
    per_syllable = "Lower is more compact. Tokens that hold a part of a Hangul syllable, by syllables."
    sections = [
        header,
        _matrix(report, "Bytes per token", compact, "bytes_per_token"),
        _matrix(report, "Tokens per Hangul syllable", per_syllable, "tokens_per_syllable"),
        _boundaries(report),
        _limits(report),
    ]
    return page("hcx tokenizer report", [part for part in sections if part])


def _matrix(report: TokenizerReport, title: str, lead: str, name: str) -> str:
    texts = list(dict.fromkeys((row.text, row.domain) for row in report.compression))
    cells = {(row.tokenizer, row.text): getattr(row, name) for row in report.compression}
    shown = [text for text in texts if any(cells[key] is not None for key in cells if key[1] == text[0])]
    if not shown:
        return ""
    tokenizers = list(dict.fromkeys((row.tokenizer, row.vocab_size) for row in report.compression))
    head = ["tokenizer", "ids", *(text if domain == "-" else f"{text} ({domain})" for text, domain in shown)]
    rows = [
        [escape(tokenizer), f"{size:,}", *(_number(cells.get((tokenizer, text))) for text, _ in shown)]
        for tokenizer, size in tokenizers
    ]
    domains = "; ".join(f"{key}: {meaning}" for key, meaning in DOMAINS.items() if any(d == key for _, d in shown))
    return section(title, escape(f"{lead} {domains}"), table(head, rows))


def _boundaries(report: TokenizerReport) -> str:
    if not report.boundaries:
        return ""
    parts = []
    for judge in dict.fromkeys(row.judge for row in report.boundaries):
        rows = [row for row in report.boundaries if row.judge == judge]
        judged = max(row.boundaries for row in rows)
        body = table(
            ["tokenizer", "ids", "F1", "precision", "recall"],
            [
                [escape(row.tokenizer), f"{row.vocab_size:,}", *map(_number, (row.f1, row.precision, row.recall))]
                for row in rows
            ],
        )
        parts.append(f"<h3>{escape(judge)}, {judged:,} boundaries</h3>{body}")
    lead = (
        "Token boundaries inside words against morpheme boundaries. Places that a contraction hides are left out. A "
        "tokenizer with shorter tokens finds more boundaries by having more ends: read recall with precision."
    )
    return section("Boundaries of Korean morphemes", lead, "".join(parts))


def _limits(report: TokenizerReport) -> str:
    points = list(report.unavailable)
    lossy = sorted({row.tokenizer for row in report.compression if not row.lossless})
    if lossy:
        points.append(
            f"Tokens that are not the bytes of the text (normalised or with an added space): {', '.join(lossy)}."
        )
    points.append("Compactness is no measure of how well a model learns; that takes trained models.")
    points += [f"{name}: read from {source}" for name, source in report.sources.items() if name != source]
    return section("What was not shown", "Read this before quoting a number.", bullets(points))


def _number(value: float | None) -> str:
    return '<span class="faint">-</span>' if value is None else f"{value:.3f}"
