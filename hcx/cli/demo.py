"""`hcx demo`: the whole path on real text, on this machine, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, table

LANGUAGES = {"ko": "Korean", "en": "English", "code": "code"}


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="directory of everything the demo makes")] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="time for training; the rest takes a few minutes more")] = 8.0,
    quick: Annotated[bool, typer.Option("--quick", help="a check of the path: little training, few items")] = False,
) -> None:
    """Text to tokenizer, shards, training, compression, serving, evaluation and one report. Run again, it goes on."""
    from hcx.cli import demo_steps as steps
    from hcx.errors import ConfigError
    from hcx.report import write_report

    if not 0.05 <= minutes <= 600:
        raise ConfigError(f"--minutes {minutes:g}: must lie between 0.05 and 600")
    clock = steps.Clock()
    plan = steps.DemoPlan(out, minutes, quick)
    for title, step in (
        ("Korean, English and code to tokens", steps.build_data),
        ("training", steps.train),
        ("compression to 4, 3, 2 and 1 bits", steps.compress),
        ("quality on held-out text, in each language", steps.measure),
        ("evaluation through lm-eval", steps.evaluate),
        ("samples side by side", steps.sample),
        ("serving the compressed model", steps.serve),
    ):
        echo(f"{clock.stamp()}  {title}")
        step(plan)
    page = write_report([out], out / "report")
    quality = steps.read_quality(plan)
    full = quality.models[0]
    echo()
    rows = []
    for language, name in LANGUAGES.items():
        if language not in full.bits_per_byte:
            continue
        rows.append(
            (
                name,
                *(f"{quality.baselines[kind][language]:.3f}" for kind in quality.baselines),
                *(f"{model.bits_per_byte[language].value:.3f}" for model in quality.models),
            )
        )
    columns = ("held-out bits per byte", *quality.baselines, *(model.label for model in quality.models))
    table("software-documentation register; lower is better", columns, rows)
    sizes = [
        (model.label, f"{model.bits_per_weight:.2f}", f"{model.file_bytes / 1e6:.2f} MB") for model in quality.models
    ]
    table("", ("model", "bits per weight of the matrices", "weight files"), sizes)
    for verdict in quality.verdicts:
        echo(f"{'met    ' if verdict.met else 'NOT met'}  {verdict.name}: {verdict.detail}")
    echo(f"\nreport: {page}")
    echo(f"chat with it: hcx chat {out / 'bcq4'}   serve it: hcx serve {out / 'bcq4'}   ({clock.stamp()} in all)")
