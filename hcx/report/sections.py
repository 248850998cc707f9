"""The measured sections: training, text, compression, evaluation. A piece that is missing is said to be missing."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from hcx.report import plots
from hcx.report.evidence import Evidence, Run
from hcx.report.markup import absent, figure, figures, in_order, language_name, measure, megabytes, section, table
from hcx.report.schema import LANGUAGES, EvalMetric, Measure, ModelQuality, Quality

MAX_POINTS = 1500
"""Points per curve: more only makes the file larger."""
REGISTER = "software-documentation register"
VALIDATION = "validation/bits_per_byte/"
SHARE = "data/share/"


def trained_run(evidence: Evidence) -> Run | None:
    """The run that the page shows: the last one with a training loss."""
    trained = [run for run in evidence.runs if run.series("train/loss")[0]]
    return trained[-1] if trained else None


def korean_register(evidence: Evidence) -> str:
    """What kind of text the Korean figures speak for; empty where the artifacts do not state it."""
    if evidence.quality and "ko" in evidence.quality.held_out:
        return evidence.quality.held_out["ko"].description
    for artifact in evidence.of_kind("shards"):
        sources = _mapping(_mapping(artifact.manifest.config.get("languages")).get("ko")).get("sources")
        if isinstance(sources, list) and any(_mapping(source).get("kind") == "embedded" for source in sources):
            return REGISTER
    return ""


def korean_tag(evidence: Evidence) -> str:
    """The register as the tag of a section."""
    register = korean_register(evidence)
    return f"Korean: {register}" if register else ""


def trained_on_tag(evidence: Evidence) -> str:
    """The register of the training text, for sections whose own questions are of other kinds."""
    register = korean_register(evidence)
    return f"Korean training text: {register}" if register else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    step = -(-len(xs) // MAX_POINTS) or 1
    return xs[::step], ys[::step]


def training(evidence: Evidence) -> str:
    """Loss, held-out curves and throughput of the run."""
    run = trained_run(evidence)
    if run is None:
        return absent("Training", "A training run leaves metrics.jsonl: hcx train RECIPE.")
    found = [figure(plots.loss_curve(*_thin(*run.series("train/loss"))), "Each step, and its moving average.")]
    missing = []
    keys = {key for row in run.rows for key in row if key.startswith(VALIDATION)}
    curves = {language: run.series(VALIDATION + language) for language in in_order(_languages_of(keys, VALIDATION))}
    curves = {language: points for language, points in curves.items() if points[0]}
    if curves:
        name, baseline = best_baseline(evidence.quality)
        caption = "Documents that no training text came from, end of document included. Lower is better."
        found.append(figure(plots.bits_per_byte_curves(curves, baseline, LANGUAGES, name), caption))
        if not baseline:
            missing.append("No Kneser-Ney baseline was found to compare with.")
    else:
        missing.append("The run scored no held-out text.")
    steps, rates = _thin(*run.series("throughput/tokens_per_s"))
    if rates:
        found.append(figure(plots.throughput(steps, rates), "Of the machine that trained, data loading included."))
    else:
        missing.append("The run recorded no throughput.")
    lead = " ".join([_described(run), *missing])
    return section("Training", lead, figures(*found), tag=korean_tag(evidence))


def _described(run: Run) -> str:
    if not run.recipe:
        return "The run's recipe was not found."
    model, data, optim, engine, train = (
        _mapping(run.recipe.get(key)) for key in ("model", "data", "optim", "engine", "train")
    )

    def told(values: Mapping[str, Any], key: str, default: str = "?") -> str:
        return escape(str(values.get(key, default)))

    return (
        f"{told(model, 'architecture', 'llama')}: {told(model, 'num_layers')} blocks of width "
        f"{told(model, 'hidden_size')}, vocabulary {told(model, 'vocab_size')}; {told(train, 'global_batch')} rows of "
        f"{told(data, 'seq_len')} tokens per step; {told(optim, 'kind')}; engine {told(engine, 'kind', 'torch')}, "
        f"{told(engine, 'precision', 'fp32')}."
    )


def _languages_of(keys: set[str], prefix: str) -> list[str]:
    return sorted(key.removeprefix(prefix) for key in keys)


def best_baseline(quality: Quality | None) -> tuple[str, dict[str, float]]:
    """Each language's lowest Kneser-Ney figure: the one that a model has to beat."""
    kinds = quality.baselines if quality else {}
    languages = in_order(key for values in kinds.values() for key in values)
    best = {
        language: min(values[language] for values in kinds.values() if language in values) for language in languages
    }
    name = "Kneser-Ney (better)" if len(kinds) > 1 else f"Kneser-Ney {next(iter(kinds), '')}".rstrip()
    return name, best


def text(evidence: Evidence) -> str:
    """What was trained on, and in which shares."""
    shards = evidence.of_kind("shards")
    if not shards:
        return absent("Text", "Shards come from hcx data build RECIPE.")
    counts = shards[-1].manifest.counts
    languages = _mapping(counts.get("languages"))
    rows, sources = [], []
    for language in in_order(languages):
        splits = _mapping(languages[language])
        for split, name in (("train", "training"), ("validation", "held out")):
            found = _mapping(splits.get(split))
            documents, tokens, size = (_number(found.get(key)) for key in ("documents", "tokens", "bytes"))
            rows.append(
                (
                    escape(language_name(language)),
                    name,
                    f"{documents:,.0f}",
                    f"{tokens:,.0f}",
                    megabytes(size),
                    f"{size / tokens:.2f}" if tokens else "",
                )
            )
        listed = _mapping(_mapping(splits.get("train")).get("source_bytes"))
        for source, size in sorted(listed.items(), key=lambda item: (-_number(item[1]), item[0])):
            sources.append((escape(source), escape(language_name(language)), megabytes(_number(size))))
    body = [table(("language", "split", "documents", "tokens", "text", "bytes per token"), rows, (1,))]
    run = trained_run(evidence)
    realised = {}
    if run is not None:
        keys = {key for row in run.rows for key in row if key.startswith(SHARE)}
        lasts = {language: run.last(SHARE + language) for language in in_order(_languages_of(keys, SHARE))}
        realised = {language: share for language, share in lasts.items() if share is not None}
    planned = {key: _number(value) for key, value in _mapping(counts.get("shares")).items()}
    columns = []
    if planned or realised:
        told = "Bars: what the run read." if realised else "No run was found: only what was planned is shown."
        drawn = plots.shares(planned, realised, LANGUAGES)
        columns.append(figure(drawn, f"{told} Mark: what the recipe asked for." if realised and planned else told))
    else:
        body.append("<p>Neither planned nor realised shares were recorded.</p>")
    if sources:
        listed_sources = table(("source", "language", "text"), sources, (1,))
        columns.append(f"<div><h3>Sources of the training text</h3>{listed_sources}</div>")
    lead = "Exact duplicates removed; whole files held out."
    return section("Text", lead, "".join(body) + figures(*columns), tag=korean_tag(evidence))


def compression(evidence: Evidence) -> str:
    """Models, bits per weight against quality, divergence from full precision."""
    quality = evidence.quality
    if quality is None or not quality.models:
        return absent("Compression", "hcx demo measures it; so does hcx compress MODEL --bits N --report.")
    languages = in_order(language for model in quality.models for language in model.bits_per_byte)
    rows = [
        (
            f"Kneser-Ney {escape(name)}",
            "",
            "",
            *(measure(Measure(value=values[key]) if key in values else None) for key in languages),
        )
        for name, values in quality.baselines.items()
    ]
    rows += [
        (
            f'<b>{escape(model.label)}</b><small class="digest">{_short(model.digest)}</small>',
            f"{model.bits_per_weight:.2f}",
            megabytes(model.file_bytes),
            *(measure(model.bits_per_byte.get(language)) for language in languages),
        )
        for model in quality.models
    ]
    head = ("model", "bits per weight", "weight files", *(f"{language_name(key)}, bits per byte" for key in languages))
    body = table(head, rows) + figures(*_trade_offs(quality, languages))
    diverging = [model for model in quality.models if model.kl]
    if diverging:
        kl_rows = [
            (
                f"<b>{escape(model.label)}</b>",
                *(measure(model.kl.get(language), 4) for language in languages),
                *(f"{model.top1[key].value:.1%}" if key in model.top1 else measure(None) for key in languages),
            )
            for model in diverging
        ]
        kl_head = (
            "model",
            *(f"KL, {language_name(language)}" for language in languages),
            *(f"same top token, {language_name(language)}" for language in languages),
        )
        body += f"<h3>Divergence from full precision</h3>{table(kl_head, kl_rows)}"
    else:
        body += "<p>Divergence from full precision was not measured.</p>"
    body += _own_grids(quality) + _paired(quality, languages)
    held_out = "; ".join(
        f"{language_name(key)}: {held.documents:,} documents, {megabytes(held.bytes)}"
        + (f" ({held.description})" if held.description else "")
        for key, held in quality.held_out.items()
    )
    lead = escape(quality.protocol).replace(" %", "&nbsp;%") + (f" Scored: {escape(held_out)}." if held_out else "")
    return section("Compression", lead, body, tag=korean_tag(evidence))


def _own_grids(quality: Quality) -> str:
    """A remark on models that were quantized to the grid that they came from."""
    names = list(dict.fromkeys(model.label.removesuffix(", fast") for model in quality.models if model.own_grid))
    if not names:
        return ""
    return (
        f"<p><b>No comparison:</b> the weights behind {escape(', '.join(names))} were values of that very grid before "
        "(the model had been quantized once), so no error is no merit of the method. Other bits or another group size "
        "can be compared.</p>"
    )


def _paired(quality: Quality, languages: list[str]) -> str:
    """What each model costs against full precision on the same rows, with its numerics and speed."""
    compared = [model for model in quality.models if model.difference]
    if not compared:
        return ""

    def told(model: ModelQuality, language: str) -> str:
        found = model.difference.get(language)
        return measure(None) if found is None else f"{measure(found, 4)}<small>p = {found.p_value:.2g}</small>"

    rows = [
        (
            f"<b>{escape(model.label)}</b>",
            escape(model.numerics),
            *(told(model, language) for language in languages),
            "" if model.tokens_per_s is None else f"{model.tokens_per_s:.1f}",
        )
        for model in compared
    ]
    titles = (f"bits per byte more, {language_name(language)}" for language in languages)
    head = ("model", "numerics", *titles, "tokens per second")
    return f"<h3>Paired with full precision</h3>{table(head, rows)}"


def _short(digest: str) -> str:
    return escape(digest.removeprefix("sha256:")[:12])


def _trade_offs(quality: Quality, languages: list[str]) -> list[str]:
    """Figures over the compressed models; none with fewer than two, for a point is no curve."""
    coded = [model for model in quality.models if model.bits is not None]
    if len(coded) < 2:
        return []
    bytes_points = {
        key: [(model.bits_per_weight, model.bits_per_byte[key].value) for model in coded if key in model.bits_per_byte]
        for key in languages
    }
    bytes_points = {key: points for key, points in bytes_points.items() if points}
    whole = next((model for model in quality.models if model.bits is None), None)
    full = {key: whole.bits_per_byte[key].value for key in bytes_points if whole and key in whole.bits_per_byte}
    caption = "Bits per weight of the compressed matrices, scales counted. Lower is better."
    found = [
        figure(plots.against_bits("Held-out bits per byte", "bits per byte", bytes_points, full, LANGUAGES), caption)
    ]
    kl_points = {
        key: [(model.bits_per_weight, model.kl[key].value) for model in coded if key in model.kl] for key in languages
    }
    kl_points = {key: points for key, points in kl_points.items() if points}
    if kl_points:
        drawn = plots.against_bits("Divergence", "KL, nats per token", kl_points, {}, LANGUAGES, log=True)
        found.append(figure(drawn, "From full precision; logarithmic. Lower is better."))
    return found


def _score(metric: EvalMetric) -> str:
    if metric.value is None:
        return '<span class="faint">-</span>'
    digits = 1 if abs(metric.value) >= 10 else 3
    interval = ""
    if metric.interval is not None:
        interval = f"<small>{metric.interval[0]:.{digits}f} to {metric.interval[1]:.{digits}f}</small>"
    mark = '<span class="chance">interval contains chance</span>' if metric.contains_chance else ""
    return f"{metric.value:.{digits}f}{interval}{mark}"


def evaluation(evidence: Evidence) -> str:
    """Scores of every task beside each other, one column per evaluated model."""
    if not evidence.evals:
        return absent("Evaluation", "hcx eval MODEL --suite demo --out DIR.")
    labels = list(dict.fromkeys(run.model_label for run in evidence.evals))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    about: dict[tuple[str, str], tuple[str, str, str]] = {}
    skipped: dict[str, str] = {}
    protocols: dict[str, str] = {}
    for run in evidence.evals:
        skipped |= run.results.skipped
        for task, entry in run.results.tasks.items():
            if isinstance(entry.protocol, str):
                protocols[task] = entry.protocol
            for name, metric in entry.metrics.items():
                cells.setdefault((task, name), {})[run.model_label] = _score(metric)
                items = f"{metric.n:,}" if metric.n else ""
                if metric.n and entry.of and entry.items is not None and entry.items < entry.of:
                    items += f"<small>of {entry.of:,}</small>"
                chance = "" if metric.chance is None else f"{metric.chance:.3f}"
                about[task, name] = (
                    ", ".join(filter(None, (name, language_name(entry.language or "")))),
                    items,
                    chance,
                )
    rows = [
        (
            f"{escape(task)}<small>{escape(about[task, name][0])}</small>",
            about[task, name][1],
            about[task, name][2],
            *(found.get(label, '<span class="faint">-</span>') for label in labels),
        )
        for (task, name), found in cells.items()
    ]
    body = table(("task", "items", "chance", *labels), rows)
    if protocols:
        told = "".join(f"<dt>{escape(task)}</dt><dd>{escape(told)}</dd>" for task, told in protocols.items())
        body += f"<details><summary>How each task is asked and scored</summary><dl>{told}</dl></details>"
    if skipped:
        left = "".join(f"<li><b>{escape(task)}</b>: {escape(why)}</li>" for task, why in skipped.items())
        body += f"<h3>Tasks that were not run</h3><ul>{left}</ul>"
    lead = (
        "Through lm-eval. 95&nbsp;% intervals over the items; a score whose interval contains chance cannot be told "
        "from guessing."
    )
    return section("Evaluation", lead, body, tag=trained_on_tag(evidence))
