"""The page: sections of plain HTML over what was found. Everything that a model or a file said is escaped."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from hcx.artifacts import new_artifact
from hcx.report.dropbp import dropbp
from hcx.report.evidence import Evidence, collect
from hcx.report.ledger import ledger
from hcx.report.markup import absent, bullets, in_order, language_name, section, table
from hcx.report.sections import (
    compression,
    evaluation,
    korean_register,
    korean_tag,
    text,
    trained_on_tag,
    trained_run,
    training,
)

STYLE = Path(__file__).with_name("page.css")
SMALL_RUN_TOKENS = 1e9
"""Below this, the page says that a model cannot know anything."""


def write_report(directories: Sequence[str | Path], out: str | Path) -> Path:
    """Writes `OUT/index.html`, replacing an older report.

    Args:
        directories: where artifacts and runs are looked for.
        out: directory of the report.

    Returns:
        The path of the page.

    Raises:
        HcxError: a directory does not exist, holds nothing, or `out` is something else than a report.
    """
    out = Path(out)
    evidence = collect(directories)
    replaces = (out / "index.html").is_file()
    with new_artifact(out, "report", {"directories": [str(d) for d in directories]}, overwrite=replaces) as artifact:
        (artifact.path / "index.html").write_text(render(evidence), encoding="utf-8")
    return out / "index.html"


def render(evidence: Evidence) -> str:
    """The whole page as one string: no script, no request to anywhere."""
    sections = [
        _summary(evidence),
        training(evidence),
        dropbp(evidence),
        text(evidence),
        compression(evidence),
        evaluation(evidence),
        _methods(evidence),
        _samples(evidence),
        _serving(evidence),
        _ledger(evidence),
        _limits(evidence),
    ]
    title = " and ".join(escape(directory.resolve().name) for directory in evidence.directories[:3])
    return page(f"hcx report: {title}", filter(None, sections))


def page(title: str, blocks: Iterable[str]) -> str:
    """A self-contained page; `title` and `blocks` are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        "<main>\n" + "\n".join(blocks) + "\n</main>\n</body>\n</html>\n"
    )


def _summary(evidence: Evidence) -> str:
    names = ", ".join(escape(str(directory)) for directory in evidence.directories)
    cards = "".join(
        f'<div class="fact"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in _facts(evidence)
    )
    return (
        "<header><h1>From raw text to a compressed, served model</h1>"
        f'<p class="lead">What lies in {names}, measured by hcx.</p></header>\n'
        + (f'<div class="facts">{cards}</div>\n' if cards else "")
        + _verdicts(evidence)
    )


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    run, quality = trained_run(evidence), evidence.quality
    facts: list[tuple[str, str]] = []
    if run is not None:
        tokens, rates = run.last("train/tokens"), run.series("throughput/tokens_per_s")[1]
        if tokens is not None:
            facts.append((f"{tokens / 1e6:,.2f} M", "training tokens"))
        if rates:
            facts.append((f"{statistics.median(rates):,.0f}", "training tokens per second, median"))
    if quality is not None and quality.models:
        first = quality.models[0]
        register = korean_register(evidence)
        for language in in_order(first.bits_per_byte):
            kind = f" ({register})" if register and language == "ko" else ""
            facts.append(
                (
                    f"{first.bits_per_byte[language].value:.3f}",
                    f"bits per byte, {language_name(language)}, held out{kind}",
                )
            )
        four = next((model for model in quality.models if model.bits == 4 and model.file_bytes), None)
        if first.bits is None and four is not None:
            facts.append((f"{first.file_bytes / four.file_bytes:.1f} x", "smaller weight files at 4 bits"))
    return facts


def _verdicts(evidence: Evidence) -> str:
    title = "What was asked, and what came out"
    if evidence.quality is None or not evidence.quality.verdicts:
        return absent(title, "No measurement here decides a bar; hcx demo measures them.")
    rows = [
        f'<div class="verdict"><span class="mark {"met" if verdict.met else "unmet"}">'
        f"{'met' if verdict.met else 'not met'}</span>"
        f'<div>{escape(verdict.name)}<br><span class="faint">{escape(verdict.detail)}</span></div></div>'
        for verdict in evidence.quality.verdicts
    ]
    return section(title, "Decided by the measurements below.", "".join(rows), tag=korean_tag(evidence))


def _samples(evidence: Evidence) -> str:
    samples = evidence.samples
    if samples is None:
        return absent("Samples", "hcx demo writes them.")
    blocks = []
    for sample in samples.samples:
        outputs = "".join(
            f'<div class="output"><b>{escape(label)}</b><div>{_said(answer)}</div></div>'
            for label, answer in sample.outputs.items()
        )
        kind = "code" if sample.language == "code" else "text"
        language = {"ko": "ko", "en": "en"}.get(sample.language, "zxx")
        blocks.append(
            f'<div class="sample {kind}" lang="{language}"><div class="prompt">{escape(sample.prompt)}</div>'
            f'<div class="outputs">{outputs}</div></div>'
        )
    body = f'<div class="samples">{"".join(blocks)}</div>'
    return section("Samples side by side", escape(samples.protocol), body, tag=trained_on_tag(evidence))


def _methods(evidence: Evidence) -> str:
    methods = evidence.methods
    if methods is None:
        return ""
    rows = [[escape(cell) for cell in row] for row in methods.cells]
    return section(f"Methods beside each other: {methods.name}", escape(methods.protocol), table(methods.columns, rows))


def _serving(evidence: Evidence) -> str:
    serving = evidence.serving
    if serving is None:
        return absent("Serving", "hcx serve MODEL; the demo talks to it and records the answers.")
    rows = []
    for request in serving.requests:
        speed = f"{request.tokens / request.seconds:.0f} tokens/s" if request.seconds > 0 else ""
        first = "" if request.ttft_ms is None else f"{request.ttft_ms:.0f} ms"
        rows.append(
            (
                escape(request.title),
                escape(request.prompt),
                _said(request.text),
                f"{request.tokens}",
                f"{request.seconds:.2f} s",
                first,
                speed,
            )
        )
    head = ("request", "sent", "received", "tokens", "time", "first text", "speed")
    lead = (
        f"The {escape(serving.model)} model behind OpenAI's protocol; numerics class {escape(serving.numerics)}, "
        f"kernel {escape(serving.backend) or 'not stated'}. Times as a client saw them, one request at a time."
    )
    return section("Serving", lead, table(head, rows, (1, 2)), tag=trained_on_tag(evidence))


def _said(text: str) -> str:
    """Model output, as text; that it is empty is told apart from a fault of the page."""
    return escape(text) if text.strip() else '<span class="faint">(empty)</span>'


def _ledger(evidence: Evidence) -> str:
    lines = ledger(evidence)
    if not lines:
        return absent("Ledger", "Artifacts carry manifest.json.")
    items = []
    for line in lines:
        role = f"{escape(line.role)}: " if line.role else ""
        detail = f' <span class="faint">{escape(line.detail)}</span>' if line.detail else ""
        state = ' <span class="faint">(above)</span>' if line.repeated else ""
        if not line.known:
            state = ' <span class="faint">(not in these directories)</span>'
        digest = (
            f' <span class="digest">{escape(line.digest.removeprefix("sha256:")[:16])}</span>' if line.digest else ""
        )
        items.append(
            f'<li style="padding-left:{1.3 * line.depth:.1f}rem">{role}<b>{escape(line.kind)}</b> {escape(line.name)}'
            f"{digest}{detail}{state}</li>"
        )
    lead = "Each artifact names its inputs by the digest of their manifests, as far back as these manifests go."
    return section("Ledger", lead, f'<ul class="ledger">{"".join(items)}</ul>')


def _limits(evidence: Evidence) -> str:
    points = []
    register = korean_register(evidence)
    if register:
        points.append(f"The Korean text is of one kind ({register}): no figure here speaks for other kinds of text.")
    run = trained_run(evidence)
    tokens = run.last("train/tokens") if run else None
    if tokens is not None and tokens < SMALL_RUN_TOKENS:
        points.append(
            f"A model trained on {tokens / 1e6:,.2f} million tokens holds no knowledge; it shows that the path works."
        )
    if evidence.serving is not None and "reference" in evidence.serving.backend + evidence.serving.numerics:
        points.append(
            "Compressed weights are multiplied by the plain reference kernel: smaller files, no gain in speed."
        )
    points.append("Speeds are those of the one machine that made these artifacts.")
    if evidence.methods is None:
        points.append(
            "One training run: the spread between seeds is not known. Intervals cover the held-out text only."
        )
    missing = [name for name, found in _pieces(evidence).items() if not found]
    if missing:
        points.append(f"Not in these directories: {', '.join(missing)}.")
    unread = f"<h3>What could not be read</h3>{bullets(evidence.notes)}" if evidence.notes else ""
    footer = "<footer>Made by hcx. The artifacts in the ledger hold the figures above.</footer>"
    return section("What was not shown", "Read this before quoting a number.", bullets(points) + unread) + footer


def _pieces(evidence: Evidence) -> dict[str, bool]:
    return {
        "a training run": trained_run(evidence) is not None,
        "packed text": bool(evidence.of_kind("shards")),
        "held-out quality": evidence.quality is not None,
        "evaluations": bool(evidence.evals),
        "samples": evidence.samples is not None,
        "requests to a server": evidence.serving is not None,
    }
