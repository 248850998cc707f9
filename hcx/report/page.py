"""The page: sections of plain HTML over what was found. Everything that a model or a file said is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from hcx.artifacts import new_artifact
from hcx.report import plots
from hcx.report.evidence import Evidence, Run, collect
from hcx.report.ledger import ledger
from hcx.report.schema import LANGUAGES, EvalMetric, Measure, Quality

STYLE = Path(__file__).with_name("page.css")
REGISTER = "software-documentation register"
MAX_POINTS = 1500
"""Points per curve: more only makes the file larger."""


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
        _training(evidence),
        _data(evidence),
        _compression(evidence),
        _evaluation(evidence),
        _samples(evidence),
        _serving(evidence),
        _ledger(evidence),
        _limits(evidence),
    ]
    title = " and ".join(escape(directory.resolve().name) for directory in evidence.directories[:3])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>hcx report: {title}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        "<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, lead: str, body: str, tag: str = "") -> str:
    label = f'<span class="tag">{escape(tag)}</span>' if tag else ""
    return f'<section>\n<h2>{escape(title)}{label}</h2>\n<p class="lead">{lead}</p>\n{body}\n</section>'


def _absent(title: str, how: str) -> str:
    return _section(title, f"Nothing was found. {how}", "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    """Cells are HTML already."""

    def cell(tag: str, column: int, value: str) -> str:
        return f"<{tag}{' class=text' if column in text_columns else ''}>{value}</{tag}>"

    top = "".join(cell("th", column, escape(name)) for column, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(cell("td", column, value) for column, value in enumerate(row)) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _figures(*figures: str) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _name(language: str) -> str:
    return LANGUAGES.get(language, language)


def _languages(quality: Quality) -> list[str]:
    found = quality.models[0].bits_per_byte if quality.models else {}
    return [*(key for key in LANGUAGES if key in found), *(key for key in found if key not in LANGUAGES)]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f} MB"


def _run_of(evidence: Evidence) -> Run | None:
    trained = [run for run in evidence.runs if run.series("train/loss")[0]]
    return trained[-1] if trained else None


def _summary(evidence: Evidence) -> str:
    run, quality = _run_of(evidence), evidence.quality
    facts: list[tuple[str, str]] = []
    if run is not None:
        tokens, rate = run.last("train/tokens"), run.series("throughput/tokens_per_s")[1]
        facts.append((f"{(tokens or 0) / 1e6:,.2f} M", "training tokens"))
        if rate:
            facts.append((f"{sorted(rate)[len(rate) // 2]:,.0f}", "tokens per second, median"))
    if quality is not None and quality.models:
        full = quality.models[0]
        for language in _languages(quality):
            facts.append((f"{full.bits_per_byte[language].value:.3f}", f"bits per byte, {_name(language)}, held out"))
        four = next((model for model in quality.models if model.bits == 4), None)
        if four is not None:
            facts.append((f"{full.file_bytes / four.file_bytes:.1f} x", "smaller weight files at 4 bits"))
    cards = "".join(f'<div class="fact"><b>{value}</b><span>{escape(name)}</span></div>' for value, name in facts)
    verdicts = ""
    if quality is not None and quality.verdicts:
        verdicts = _section(
            "What was asked, and what came out",
            "Decided by the measurements below.",
            "".join(
                f'<div class="verdict"><span class="mark {"met" if verdict.met else "unmet"}">'
                f"{'met' if verdict.met else 'not met'}</span>"
                f'<div>{escape(verdict.name)}<br><span class="faint">{escape(verdict.detail)}</span></div></div>'
                for verdict in quality.verdicts
            ),
        )
    names = ", ".join(escape(str(directory)) for directory in evidence.directories)
    return (
        f"<header><h1>From raw text to a compressed, served model</h1>"
        f'<p class="lead">What lies in {names}, measured by hcx.</p></header>\n'
        f'<div class="facts">{cards}</div>\n{verdicts}'
    )


def _thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    step = -(-len(xs) // MAX_POINTS) or 1
    return xs[::step], ys[::step]


def _training(evidence: Evidence) -> str:
    run = _run_of(evidence)
    if run is None:
        return _absent("Training", "A training run leaves metrics.jsonl: hcx train RECIPE.")
    figures = []
    steps, losses = _thin(*run.series("train/loss"))
    figures.append(_figure(plots.loss_curve(steps, losses), "Each step, and its moving average."))
    prefix = "validation/bits_per_byte/"
    keys = sorted({key for row in run.rows for key in row if key.startswith(prefix)})
    curves = {key.removeprefix(prefix): run.series(key) for key in keys}
    curves = {language: points for language, points in curves.items() if points[0]}
    if curves:
        baselines = evidence.quality.baselines if evidence.quality else {}
        name, baseline = next(iter(baselines.items()), ("", {}))
        ordered = {key: curves[key] for key in [*LANGUAGES, *curves] if key in curves}
        figures.append(
            _figure(
                plots.bits_per_byte_curves(ordered, baseline, LANGUAGES, f"Kneser-Ney {name}"),
                "Whole documents that no training text came from; end of document included. Lower is better.",
            )
        )
    steps, rates = _thin(*run.series("throughput/tokens_per_s"))
    if rates:
        figures.append(_figure(plots.throughput(steps, rates), "Of this machine, data loading included."))
    recipe = run.recipe
    model, data, optim = (recipe.get(key, {}) for key in ("model", "data", "optim"))
    lead = "The run's recipe was not found."
    if recipe:
        kind = escape(str(recipe.get("engine", {}).get("kind", "?")))
        lead = (
            f"{escape(str(model.get('architecture', 'model')))}, {model.get('num_layers', '?')} blocks of width "
            f"{model.get('hidden_size', '?')}, vocabulary {model.get('vocab_size', '?')}; rows of "
            f"{data.get('seq_len', '?')} tokens; {escape(str(optim.get('kind', '?')))}; engine {kind}."
        )
    return _section("Training", lead, _figures(*figures))


def _data(evidence: Evidence) -> str:
    shards = evidence.of_kind("shards")
    if not shards:
        return _absent("Text", "Shards come from hcx data build RECIPE.")
    counts = shards[-1].manifest.counts
    languages = counts.get("languages", {})
    rows = []
    for language, splits in languages.items():
        for split in ("train", "validation"):
            found = splits.get(split, {})
            tokens, size = found.get("tokens", 0), found.get("bytes", 0)
            rows.append(
                (
                    escape(_name(language)) if split == "train" else "",
                    "training" if split == "train" else "held out",
                    f"{found.get('documents', 0):,}",
                    f"{tokens:,}",
                    _megabytes(size),
                    f"{size / tokens:.2f}" if tokens else "",
                )
            )
    table = _table(("language", "split", "documents", "tokens", "text", "bytes per token"), rows, (1,))
    run = _run_of(evidence)
    realised = {}
    if run is not None:
        realised = {key: run.last(f"data/share/{key}") or 0.0 for key in languages}
    planned = {key: float(value) for key, value in counts.get("shares", {}).items()}
    figure = _figure(plots.shares(planned, realised or planned, LANGUAGES), "Rows of the training run by language.")
    sources = []
    for language, splits in languages.items():
        found = splits.get("train", {}).get("source_bytes", {})
        sources += [
            (escape(source), escape(_name(language)), _megabytes(size))
            for source, size in sorted(found.items(), key=lambda item: -item[1])
        ]
    listed = "<h3>Sources of the training text</h3>" + _table(("source", "language", "text"), sources, (1,))
    return _section("Text", "Exact duplicates removed; whole files held out.", table + _figures(figure) + listed)


def _measure(measure: Measure | None, digits: int = 3) -> str:
    if measure is None:
        return ""
    if measure.low is None or measure.high is None:
        return f"{measure.value:.{digits}f}"
    return f"{measure.value:.{digits}f}<small>{measure.low:.{digits}f} to {measure.high:.{digits}f}</small>"


def _compression(evidence: Evidence) -> str:
    quality = evidence.quality
    if quality is None or not quality.models:
        return _absent(
            "Compression", "hcx demo measures it; hcx compress MODEL --bits N --report --shards DIR does too."
        )
    languages = _languages(quality)
    rows = [
        (escape(name), "", "", *(_measure(Measure(value=values[k])) if k in values else "" for k in languages))
        for name, values in quality.baselines.items()
    ]
    rows += [
        (
            f"<b>{escape(model.label)}</b>",
            f"{model.bits_per_weight:.2f}",
            _megabytes(model.file_bytes),
            *(_measure(model.bits_per_byte.get(language)) for language in languages),
        )
        for model in quality.models
    ]
    head = (
        "model",
        "bits per weight",
        "weight files",
        *(f"{_name(language)}, bits per byte" for language in languages),
    )
    table = _table(head, rows)
    coded = [model for model in quality.models if model.kl]
    kl_rows = [
        (
            f"<b>{escape(model.label)}</b>",
            *(_measure(model.kl.get(language), 4) for language in languages),
            *(f"{model.top1[language].value:.1%}" if language in model.top1 else "" for language in languages),
        )
        for model in coded
    ]
    kl_head = (
        "model",
        *(f"KL, {_name(language)}" for language in languages),
        *(f"same top token, {_name(language)}" for language in languages),
    )
    figures = []
    if coded:
        points = {
            language: [(model.bits_per_weight, model.bits_per_byte[language].value) for model in coded]
            for language in languages
        }
        full = {language: quality.models[0].bits_per_byte[language].value for language in languages}
        figures.append(
            _figure(
                plots.against_bits("Held-out bits per byte", "bits per byte", points, full, LANGUAGES),
                "Bits per weight of the compressed matrices, scales counted.",
            )
        )
        points = {
            language: [(model.bits_per_weight, model.kl[language].value) for model in coded] for language in languages
        }
        figures.append(
            _figure(
                plots.against_bits("Divergence", "KL, nats per token", points, {}, LANGUAGES, log=True),
                "From full precision, logarithmic. Lower is better.",
            )
        )
    held_out = "; ".join(
        f"{_name(key)}: {held.documents:,} documents, {_megabytes(held.bytes)}"
        for key, held in quality.held_out.items()
    )
    lead = f"{escape(quality.protocol)} {escape(held_out)}."
    divergence = f"<h3>Divergence from full precision</h3>{_table(kl_head, kl_rows)}" if kl_rows else ""
    return _section("Compression", lead, table + _figures(*figures) + divergence, tag=f"Korean: {REGISTER}")


def _score(metric: EvalMetric) -> str:
    if metric.value is None:
        return ""
    digits = 1 if abs(metric.value) >= 10 else 3
    interval = ""
    if metric.interval is not None:
        interval = f"<small>{metric.interval[0]:.{digits}f} to {metric.interval[1]:.{digits}f}</small>"
    mark = '<span class="chance">interval contains chance</span>' if metric.contains_chance else ""
    return f"{metric.value:.{digits}f}{interval}{mark}"


def _evaluation(evidence: Evidence) -> str:
    if not evidence.evals:
        return _absent("Evaluation", "hcx eval MODEL --suite demo --out DIR.")
    labels = list(dict.fromkeys(run.model_label for run in evidence.evals))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    about: dict[tuple[str, str], tuple[str, str, str]] = {}
    for run in evidence.evals:
        for task, entry in run.results.tasks.items():
            for name, metric in entry.metrics.items():
                cells.setdefault((task, name), {})[run.model_label] = _score(metric)
                chance = "" if metric.chance is None else f"{metric.chance:.3f}"
                about[task, name] = (_name(entry.language or ""), f"{metric.n:,}" if metric.n else "", chance)
    rows = [
        (
            f"{escape(task)}<small>{escape(name)}, {escape(about[task, name][0])}</small>",
            about[task, name][1],
            about[task, name][2],
            *(found.get(label, "") for label in labels),
        )
        for (task, name), found in cells.items()
    ]
    lead = (
        "Through lm-eval. 95 % intervals from the items; a score whose interval contains chance says nothing about "
        "the model."
    )
    return _section("Evaluation", lead, _table(("task", "items", "chance", *labels), rows))


def _samples(evidence: Evidence) -> str:
    samples = evidence.samples
    if samples is None:
        return _absent("Samples", "hcx demo writes them.")
    blocks = []
    for sample in samples.samples:
        outputs = "".join(
            f'<div class="output"><b>{escape(label)}</b><div>{escape(text)}</div></div>'
            for label, text in sample.outputs.items()
        )
        kind = "code" if sample.language == "code" else "text"
        language = {"ko": "ko", "en": "en"}.get(sample.language, "zxx")
        blocks.append(
            f'<div class="sample {kind}" lang="{language}"><div class="prompt">{escape(sample.prompt)}</div>'
            f'<div class="outputs">{outputs}</div></div>'
        )
    return _section("Samples side by side", escape(samples.protocol), f'<div class="samples">{"".join(blocks)}</div>')


def _serving(evidence: Evidence) -> str:
    serving = evidence.serving
    if serving is None:
        return _absent("Serving", "hcx serve MODEL; the demo talks to it and records the answers.")
    rows = []
    for request in serving.requests:
        speed = f"{request.tokens / request.seconds:.0f} tokens/s" if request.seconds > 0 else ""
        first = "" if request.ttft_ms is None else f"{request.ttft_ms:.0f} ms"
        rows.append(
            (
                escape(request.title),
                escape(request.prompt),
                escape(request.text) or '<span class="faint">(empty)</span>',
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
    return _section("Serving", lead, _table(head, rows, (1, 2)))


def _ledger(evidence: Evidence) -> str:
    lines = ledger(evidence)
    if not lines:
        return _absent("Ledger", "Artifacts carry manifest.json.")
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
    lead = "Each artifact names its inputs by the digest of their manifests, down to the raw text."
    return _section("Ledger", lead, f'<ul class="ledger">{"".join(items)}</ul>')


def _limits(evidence: Evidence) -> str:
    points = [
        f"Korean and English text is documentation ({REGISTER}): no figure here speaks for other kinds of text.",
        "A model of a few million parameters trained for minutes holds no knowledge; it shows that the path works.",
        "Weights are multiplied by the plain reference kernel: smaller files, not faster answers.",
        "Nothing on this page was measured on a GPU.",
        "One seed: the spread between runs is not known. Intervals cover the held-out text only.",
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in evidence.notes)
    unread = f"<h3>What could not be read</h3><ul>{notes}</ul>" if notes else ""
    listed = "<ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>"
    footer = "<footer>Made by hcx. Every figure above can be made again from the artifacts in the ledger.</footer>"
    return _section("What was not shown", "Read this before quoting a number.", listed + unread) + footer
