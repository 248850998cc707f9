"""`hcx compress`: a model directory to a binary-coded one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from hcx.compress import CompressionSummary, CompressPlan, PreviewRow
    from hcx.data import MicroBatch
    from hcx.kernels import PackedWeight
    from hcx.recipe.allocation import AllocationReport

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
    method: Annotated[str | None, typer.Option(help="alternating, refined, greedy, searched or uniform")] = None,
    offset: Annotated[bool | None, typer.Option("--offset/--no-offset", help="a constant per group")] = None,
    widths: Annotated[
        str | None, typer.Option(help="nested planes: serve at any of these, such as 2,3,4; the last is --bits")
    ] = None,
    feedback: Annotated[
        bool | None,
        typer.Option("--feedback/--no-feedback", help="keep layers' outputs, not weights (reads calibration text)"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="shards whose training text calibration reads; those MODEL was trained on if absent"),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="measure what it cost on held-out text; OUT-report has JSON and a page")
    ] = False,
    shards: Annotated[
        Path | None,
        typer.Option(help="shards whose held-out text --report reads; those MODEL was trained on if absent"),
    ] = None,
    average_bits: Annotated[
        float | None,
        typer.Option("--average-bits", help="planes per weight on average: measure sensitivities, then allocate"),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="what gets a width of its own: layer, type or matrix")] = "layer",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan, and compress nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the outcome as JSON")] = False,
) -> None:
    """Compresses the linear layers of every block; embedding, output and norms are kept unless a plan says otherwise.

    --bits, --group-size, --method, --offset, --widths and --feedback change the plan's default; without --plan they are
    the plan.
    """
    from hcx.compress import compress_model, plan_rows
    from hcx.errors import ConfigError
    from hcx.obs import Progress, get_logger

    nested = _widths(widths)
    if bits is None and nested is not None:
        bits = nested[-1]
    if plan is None and bits is None and average_bits is None:
        raise ConfigError("say how: --bits N (1 to 8), --average-bits B, or --plan FILE")
    if bits is not None and average_bits is not None:
        raise ConfigError("--bits gives every layer the same width, --average-bits chooses: take one")
    given = {
        "bits": bits,
        "group_size": group_size,
        "method": method,
        "offset": offset,
        "widths": nested,
        "feedback": feedback,
    }
    chosen = _plan(plan, {name: value for name, value in given.items() if value is not None})
    text = (shards or training_shards(model)) if report or average_bits is not None else None
    batches = None
    if average_bits is not None:
        from hcx.recipe.allocation import allocate_bits

        if not dry_run:
            _refuse_existing(out)
        log = get_logger(__name__)
        batches = _calibration(model, chosen, plan, calibration)
        allocation = allocate_bits(
            model,
            str(text),
            average_bits,
            chosen,
            by=by,
            progress=lambda read: log.info("measured %s", read),
            calibration=batches,
        )
        chosen = allocation.plan
        if not as_json:
            _show_allocation(allocation)
    rows, total = plan_rows(model, chosen)
    if dry_run and as_json:
        print_json([_row_values(row) for row in rows])
        return
    if not as_json:
        _show_plan(model, rows)
    if dry_run:
        return
    if average_bits is None:
        batches = _calibration(model, chosen, plan, calibration)
    found = _search(model, out, chosen, batches) if chosen.search is not None and batches is not None else None
    with Progress("compressing", total, "tensors") as progress:
        summary = compress_model(model, out, chosen, lambda _: progress.advance(), batches, found)
    quality = None
    if report and text is not None:
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
    if summary.own_grid:
        echo(
            f"note: the weights of {model} were values of this very grid before, so nothing was lost: that is no merit "
            "of the method; compare with other --bits or another --group-size"
        )
    if quality is not None:
        columns = ("model", "language", "bits per byte", "KL (nats per token)", "same top token")
        table(f"held-out text of {text}", columns, quality.table_rows())
        paired = ("model", "language", "bits per byte more", "p-value", "tokens per second")
        table("paired with full precision, on the same rows", paired, quality.paired_rows())
        echo(f"report: {page}")


def _plan(name: str | None, changes: dict[str, object]) -> CompressPlan:
    """The plan of this name or file, its default changed."""
    from hcx.artifacts import find_file, resource_names
    from hcx.compress import CompressPlan
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
    # Decoded whole, so that what holds between the default and the rest is checked again.
    whole = chosen.model_dump(mode="json")
    return decode(CompressPlan, {**whole, "default": whole["default"] | changes}, "the command line")


def _refuse_existing(out: Path) -> None:
    """Before sensitivities or a search: compression says so, too, but only after them."""
    from hcx.errors import ConfigError

    if out.exists():
        raise ConfigError(f"{out}: already exists; choose another directory or remove it")


def _search(model: Path, out: Path, chosen: CompressPlan, text: list[MicroBatch]) -> dict[str, PackedWeight]:
    """Searches beside OUT, in a directory that a later call with the same command goes on from."""
    import json

    from hcx.artifacts.durable import write_atomically
    from hcx.compress.run import choose_modules
    from hcx.compress.search_model import outcome_dict, search_model
    from hcx.model.load import ModelFiles, canonical_names
    from hcx.obs import Progress, get_logger

    _refuse_existing(out)
    kept = out.with_name(f"{out.name}.search")
    with ModelFiles(model) as files:
        total = len(choose_modules(files, canonical_names(files), chosen))
    with Progress("searching", total, "layers") as progress:
        found, outcome = search_model(model, chosen, text, kept, lambda _: progress.advance())
    losses = {name: sum(by.values()) / len(by) for name, by in outcome.held_out.items()}
    told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    get_logger(__name__).info(
        "%d evaluations; held-out %s: %s nats per token; kept: %s",
        outcome.evaluations,
        chosen.search.objective if chosen.search is not None else "loss",
        told,
        outcome.chosen,
    )
    write_atomically(kept / "search.json", (json.dumps(outcome_dict(outcome), indent=1) + "\n").encode())
    return found


def _widths(given: str | None) -> list[int] | None:
    from hcx.errors import ConfigError

    try:
        return None if given is None else [int(part) for part in given.split(",")]
    except ValueError:
        raise ConfigError(f"--widths {given}: expected comma-separated integers, such as 2,3,4") from None


def _calibration(
    model: Path, chosen: CompressPlan, plan: str | None, directory: Path | None
) -> list[MicroBatch] | None:
    """The calibration text, if the plan reads any."""
    from hcx.errors import ConfigError

    if not chosen.needs_calibration:
        if directory is not None:
            raise ConfigError(
                "--calibration has no effect: the plan reads no text; set importance, feedback or calibration.scaling"
            )
        return None
    from hcx.compress.calibration_text import calibration_batches
    from hcx.data import ShardSet
    from hcx.model.load import ModelFiles
    from hcx.tokenizer import Tokenizer

    with ModelFiles(model) as files:
        max_seq_len = files.config.max_seq_len
    tokenizer = Tokenizer.load(model) if (model / "tokenizer.json").is_file() else None
    texts = bool(chosen.calibration.texts)
    if texts and directory is not None:
        raise ConfigError("--calibration DIR beside calibration.texts in the plan; give one of them")
    shards = None if texts else ShardSet.open(directory or training_shards(model, "--calibration"))
    folder = Path(plan).parent if plan is not None and Path(plan).exists() else None
    return calibration_batches(chosen.calibration, max_seq_len, tokenizer, shards, folder)


def training_shards(model: Path, option: str = "--shards") -> Path:
    """The shards that the model's manifest names, if they still lie there."""
    from hcx.artifacts import artifact_input, is_complete, read_manifest
    from hcx.errors import ConfigError

    inputs = read_manifest(model).inputs if is_complete(model) else ()
    for item in inputs:
        there = item.role == "shards" and is_complete(item.path)
        if there and artifact_input("shards", item.path).digest == item.digest:
            return Path(item.path)
    raise ConfigError(f"the manifest of {model} leads to no shards that are there; name some with {option} DIR")


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
