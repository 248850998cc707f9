"""`hcx compress`: a model directory to a binary-coded one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from hcx.compress import CompressionSummary, CompressPlan
    from hcx.recipe.allocation import AllocationReport

PLANS = "launch/compress"


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
    report: Annotated[bool, typer.Option("--report", help="measure what it cost on held-out text")] = False,
    shards: Annotated[
        Path | None,
        typer.Option(help="shards whose held-out text --report reads; those MODEL was trained on if absent"),
    ] = None,
    average_bits: Annotated[
        float | None,
        typer.Option("--average-bits", help="planes per weight on average: measure sensitivities, then allocate"),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="what gets a width of its own: layer, type or matrix")] = "layer",
    as_json: Annotated[bool, typer.Option("--json", help="print the outcome as JSON")] = False,
) -> None:
    """Compresses the linear layers of every block; embedding, output and norms are kept unless a plan says otherwise.

    --bits, --group-size, --method and --offset change the plan's default; without --plan they are the plan.
    """
    from hcx.compress import compress_model
    from hcx.errors import ConfigError
    from hcx.model.load import ModelFiles, canonical_names
    from hcx.obs import Progress, get_logger

    if plan is None and bits is None and average_bits is None:
        raise ConfigError("say how: --bits N (1 to 8), --average-bits B, or --plan FILE")
    if bits is not None and average_bits is not None:
        raise ConfigError("--bits gives every layer the same width, --average-bits chooses: take one")
    given = {"bits": bits, "group_size": group_size, "method": method, "offset": offset}
    chosen = _plan(plan, {name: value for name, value in given.items() if value is not None})
    text = (shards or _training_shards(model)) if report or average_bits is not None else None
    if average_bits is not None:
        from hcx.recipe.allocation import allocate_bits

        log = get_logger(__name__)
        found = allocate_bits(
            model, str(text), average_bits, chosen, by=by, progress=lambda read: log.info("measured %s", read)
        )
        chosen = found.plan
        if not as_json:
            _show_allocation(found)
    with ModelFiles(model) as files:
        total = len(canonical_names(files))
    with Progress("compressing", total, "tensors") as progress:
        summary = compress_model(model, out, chosen, lambda _: progress.advance())
    quality = None
    if report and text is not None:
        from hcx.recipe.quality import measure_quality

        label = f"{summary.bits_per_weight:.2f} bits per weight"
        quality = measure_quality([("full precision", model), (label, out)], str(text))
    if as_json:
        print_json(summary.as_dict() | ({"quality": quality.as_rows()} if quality else {}))
        return
    _show(model, out, summary)
    if quality is not None:
        columns = ("model", "language", "bits per byte", "KL (nats per token)", "same top token")
        table(f"held-out text of {text}", columns, quality.table_rows())


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


def _show_allocation(found: AllocationReport) -> None:
    widths = sorted(next(iter(found.rises.values())))
    table(
        f"rise of the held-out loss (nats per token, worst language); {found.average_bits:.3f} bits on average",
        ("layers", "bits", *(f"at {width}" for width in widths)),
        [
            (name, found.allocation.bits[name], *(f"{max(rises[width].values()):+.4f}" for width in widths))
            for name, rises in found.rises.items()
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
