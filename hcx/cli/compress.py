"""`hcx compress`: a model directory to a binary-coded one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, print_json, table


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("compress")(compress)


def compress(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="full-precision model directory")],
    out: Annotated[Path, typer.Option(help="new directory")],
    plan: Annotated[str | None, typer.Option(help="YAML plan, such as launch/compress/bcq4.yaml")] = None,
    bits: Annotated[int | None, typer.Option(help="planes per weight, 1 to 8")] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", help="inputs that share their scales")] = None,
    method: Annotated[str | None, typer.Option(help="alternating, greedy or uniform")] = None,
    offset: Annotated[bool | None, typer.Option("--offset/--no-offset", help="a constant per group")] = None,
    report: Annotated[bool, typer.Option("--report", help="measure what it cost on held-out text (--shards)")] = False,
    shards: Annotated[Path | None, typer.Option(help="shards whose validation text --report uses")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the outcome as JSON")] = False,
) -> None:
    """Compresses the linear layers of every block; embedding, output and norms are kept."""
    from hcx.artifacts import find_resource
    from hcx.compress import CompressPlan, compress_model
    from hcx.config import load_config
    from hcx.config.decode import decode
    from hcx.errors import ConfigError
    from hcx.model.load import ModelFiles, canonical_names
    from hcx.obs import Progress

    if plan is None and bits is None:
        raise ConfigError("say how: --bits N (1 to 8), or --plan FILE")
    if report and shards is None:
        raise ConfigError("--report needs --shards DIR, whose validation text it measures on")
    chosen = load_config(CompressPlan, find_resource(plan), ()) if plan is not None else CompressPlan()
    options = {"bits": bits, "group_size": group_size, "method": method, "offset": offset}
    given = {name: value for name, value in options.items() if value is not None}
    if given:
        values = chosen.model_dump(mode="json")
        values["default"] |= given
        chosen = decode(CompressPlan, values, "the command line")
    with ModelFiles(model) as files:
        total = len(canonical_names(files))
    with Progress("compressing", total, "tensors") as progress:
        summary = compress_model(model, out, chosen, lambda _: progress.advance())
    quality = None
    if report:
        from hcx.recipe.quality import measure_quality

        quality = measure_quality([("full", model), (f"{chosen.default.bits} bit", out)], str(shards))
    if as_json:
        print_json(summary.as_dict() | ({"quality": quality.as_rows()} if quality else {}))
        return
    table(
        f"{model} -> {out}",
        ("matrices", "count", "weights", "bits per weight", "relative error"),
        [
            (
                name,
                int(row["modules"]),
                f"{row['weights']:,.0f}",
                f"{row['bits_per_weight']:.3f}",
                f"{row['relative_error']:.4f}",
            )
            for name, row in summary.by_type().items()
        ],
    )
    echo(
        f"{summary.bits_per_weight:.3f} bits per compressed weight, scales counted; weight files "
        f"{summary.source_bytes / 1e6:.2f} MB -> {summary.file_bytes / 1e6:.2f} MB"
    )
    if quality is not None:
        columns = ("model", "language", "bits per byte", "KL (nats per token)", "same top token")
        table("held-out text", columns, quality.table_rows())
