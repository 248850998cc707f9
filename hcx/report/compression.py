"""The report of one compression: what it cost on held-out text, as JSON and as a page."""

from __future__ import annotations

import json
from pathlib import Path

from hcx.artifacts import artifact_input, new_artifact
from hcx.recipe.quality import Estimate, ModelFigures, QualityFigures
from hcx.report.page import write_report
from hcx.report.schema import Difference, HeldOut, Measure, ModelQuality, Quality

PROTOCOL = (
    "Held-out documents, end of document included; KL divergence in nats per token from full precision; 95 % intervals "
    "over rows. Differences are paired: both models read the same rows, and the test flips the signs of the rows' "
    "differences at random. Tokens per second are of one request on the machine that wrote this, in passing."
)


def quality_of(figures: QualityFigures) -> Quality:
    """The figures in the form that the page reads; sizes are those of the files.

    Args:
        figures: full precision first.
    """
    held_out = {
        language: HeldOut(
            documents=figures.documents[language], tokens=figures.tokens[language], bytes=figures.num_bytes[language]
        )
        for language in figures.documents
    }
    return Quality(protocol=PROTOCOL, held_out=held_out, models=tuple(_model(model) for model in figures.models))


def _model(model: ModelFigures) -> ModelQuality:
    summary = model.directory / "compression.json"
    stated = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    files = [model.directory] if model.directory.is_file() else list(model.directory.glob("*.safetensors"))
    bits = float(stated["bits_per_weight"]) if stated else None
    return ModelQuality(
        label=model.label,
        digest=artifact_input("model", model.directory).digest,
        bits=bits,
        bits_per_weight=32.0 if bits is None else bits,
        file_bytes=sum(path.stat().st_size for path in files),
        own_grid=bool(stated.get("own_grid", False)),
        numerics=model.numerics,
        tokens_per_s=model.tokens_per_s,
        bits_per_byte=_measures(model.bits_per_byte),
        kl=_measures(model.kl),
        top1=_measures(model.top1),
        difference={
            language: Difference(value=found.value, low=found.low, high=found.high, p_value=found.p_value)
            for language, found in model.difference.items()
        },
    )


def _measures(found: dict[str, Estimate]) -> dict[str, Measure]:
    return {language: Measure(value=e.value, low=e.low, high=e.high) for language, e in found.items()}


def write_compression_report(figures: QualityFigures, shards: Path, out: Path) -> Path:
    """Writes `OUT/quality/quality.json` and `OUT/page/index.html`, replacing those of an earlier report.

    Args:
        figures: full precision first.
        shards: whose held-out text was scored.
        out: directory of the report.

    Returns:
        The path of the page.

    Raises:
        HcxError: something else lies there.
    """
    directories = list(dict.fromkeys(model.directory for model in figures.models))
    inputs = [artifact_input("shards", shards), *(artifact_input("model", directory) for directory in directories)]
    replaces = (out / "quality" / "quality.json").is_file()
    with new_artifact(out / "quality", "quality", {}, inputs, overwrite=replaces) as artifact:
        text = json.dumps(quality_of(figures).model_dump(mode="json"), ensure_ascii=False, indent=1)
        (artifact.path / "quality.json").write_text(text + "\n", encoding="utf-8")
    return write_report([out / "quality", *(d for d in directories if d.is_dir())], out / "page")
