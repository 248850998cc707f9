"""`hcx compress`: a model directory to a binary-coded one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from hcx.compress import CompressionSummary, CompressPlan, PreviewRow

PLANS = "launch/compress"
TIMED_TOKENS = 16


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("compress")(compress)


def compress(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="full-precision model directory")],
    out: Annotated[Path, typer.Option(help="new directory")],
    plan: Annotated[str | None, typer.Option(help="YAML plan: a file, or a shipped one such as bcq4")] = None,
    bits: Annotated[int | None, typer.Option(help="planes per weight, 1 to 8")] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", help="inputs that share their scales")] = None,
    method: Annotated[str | None, typer.Option(help="alternating, greedy or uniform")] = None,
    offset: Annotated[bool | None, typer.Option("--offset/--no-offset", help="a constant per group")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="measure what it cost on held-out text; OUT-report has JSON and a page")
    ] = False,
    shards: Annotated[
        Path | None,
        typer.Option(help="shards whose held-out text --report reads; those MODEL was trained on if absent"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan, and compress nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the outcome as JSON")] = False,
) -> None:
    """Compresses the linear layers of every block; embedding, output and norms are kept unless a plan says otherwise.

    --bits, --group-size, --method and --offset change the plan's default; without --plan they are the plan.
    """
    from hcx.compress import compress_model, plan_rows
    from hcx.errors import ConfigError
    from hcx.obs import Progress

    if plan is None and bits is None:
        raise ConfigError("say how: --bits N (1 to 8), or --plan FILE")
    given = {"bits": bits, "group_size": group_size, "method": method, "offset": offset}
    chosen = _plan(plan, {name: value for name, value in given.items() if value is not None})
    text = (shards or _training_shards(model)) if report else None
    rows, total = plan_rows(model, chosen)
    if dry_run and as_json:
        print_json([_row_values(row) for row in rows])
        return
    if not as_json:
        _show_plan(model, rows)
    if dry_run:
        return
    with Progress("compressing", total, "tensors") as progress:
        summary = compress_model(model, out, chosen, lambda _: progress.advance())
    quality = None
    if text is not None:
        from hcx.recipe.quality import measure_quality
        from hcx.report.compression import write_compression_report

        label = f"{summary.bits_per_weight:.2f} bits per weight"
        models = [("full precision", model, "reference"), (label, out, "reference"), (f"{label}, fast", out, "fast")]
        quality = measure_quality(models, str(text), timed_tokens=TIMED_TOKENS)
        page = write_compression_report(quality, text, out.with_name(f"{out.name}-report"))
    if as_json:
        print_json(summary.as_dict() | ({"quality": quality.as_rows()} if quality else {}))
        return
    _show(model, out, summary)
    if quality is not None:
        columns = ("model", "language", "bits per byte", "KL (nats per token)", "same top token")
        table(f"held-out text of {text}", columns, quality.table_rows())
        paired = ("model", "language", "bits per byte more", "p-value", "tokens per second")
        table("paired with full precision, on the same rows", paired, quality.paired_rows())
        echo(f"report: {page}")


def _plan(name: str | None, changes: dict[str, object]) -> CompressPlan:
    """The plan of this name or file, its default changed."""
    from hcx.artifacts import find_file, resource_names
    from hcx.compress import CompressPlan, ModulePlan
    from hcx.config import load_config
    from hcx.config.decode import decode
    from hcx.errors import ConfigError, did_you_mean

    chosen = CompressPlan()
    if name is not None:
        shipped = {Path(known).stem: known for known in resource_names(PLANS)}
        if not Path(name).exists() and name not in shipped and name not in shipped.values():
            raise ConfigError(f"--plan {name}: no such file, and no shipped plan; {did_you_mean(name, shipped)}")
        path = find_file(name if Path(name).exists() else shipped.get(name, name))
        chosen = load_config(CompressPlan, path)
    if not changes:
        return chosen
    default = decode(ModulePlan, chosen.default.model_dump(mode="json") | changes, "the command line")
    return chosen.model_copy(update={"default": default})


def _training_shards(model: Path) -> Path:
    """The shards that the model's manifest names, if they still lie there."""
    from hcx.artifacts import artifact_input, is_complete, read_manifest
    from hcx.errors import ConfigError

    inputs = read_manifest(model).inputs if is_complete(model) else ()
    for item in inputs:
        there = item.role == "shards" and is_complete(item.path)
        if there and artifact_input("shards", item.path).digest == item.digest:
            return Path(item.path)
    raise ConfigError(
        f"--report: the manifest of {model} leads to no shards that are there; name some with --shards DIR"
    )


def _row_values(row: PreviewRow) -> dict[str, object]:
    return {
        "rule": row.rule,
        "modules": list(row.modules),
        "count": row.count,
        "weights": row.weights,
        "size_bytes": row.size_bytes,
        "bits_per_weight": row.bits_per_weight,
        "settings": None if row.settings is None else row.settings.model_dump(mode="json"),
    }


def _show_plan(model: Path, rows: list[PreviewRow]) -> None:
    def settings(row: PreviewRow) -> str:
        if row.settings is None:
            return "as it is"
        return f"{row.settings.bits} bits, groups of {row.settings.group_size}\n{row.settings.method}"

    table(
        f"plan for {model}",
        ("rule", "matrices", "settings", "weights", "bits each", "MB"),
        [
            (
                row.rule,
                f"{row.count} x\n" + "\n".join(row.modules),
                settings(row),
                f"{row.weights:,}",
                f"{row.bits_per_weight:.3f}",
                f"{row.size_bytes / 1e6:.2f}",
            )
            for row in rows
        ],
    )


def _show(model: Path, out: Path, summary: CompressionSummary) -> None:
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
        f"{summary.bits_per_weight:.3f} bits per compressed weight, scales counted; "
        f"{summary.kept_weights:,} weights kept as they were ({summary.kept_bytes / 1e6:.2f} MB); "
        f"weight files {summary.source_bytes / 1e6:.2f} MB -> {summary.file_bytes / 1e6:.2f} MB"
    )
