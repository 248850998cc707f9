"""`hcx bench search`: the search by the task loss beside the clip of least squared error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, keep_rows, table, write_rows


def search(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="full-precision model directory, small")],
    shards: Annotated[
        Path | None,
        typer.Option(help="shards of the model's tokenizer; those MODEL was trained on if absent"),
    ] = None,
    bits: Annotated[str, typer.Option(help="of the even grids, comma-separated")] = "2,3,4",
    seeds: Annotated[str, typer.Option(help="comma-separated; each draws other calibration text")] = "0,1,2,3",
    group_size: Annotated[int, typer.Option("--group-size", help="inputs that share a step")] = 128,
    tokens: Annotated[int, typer.Option(help="of calibration text")] = 8192,
    objective: Annotated[str, typer.Option(help="divergence from full precision, or loss")] = "divergence",
    feedback: Annotated[bool, typer.Option(help="search the damping of error feedback, too")] = True,
    start: Annotated[str, typer.Option(help="least_squares or rounding")] = "least_squares",
    noise: Annotated[float, typer.Option(help="standard errors by which a setting must be better")] = 2.0,
    rounds: Annotated[int, typer.Option(help="over all knobs of a layer")] = 2,
    max_documents: Annotated[int | None, typer.Option(help="scored per language")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="directory for finished evaluations; the same command goes on from there")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one case, one round, little text")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Held-out task loss of the searched clips and roundings, of the clip of least squared error, and of rounding."""
    from hcx.cli.compress import training_shards
    from hcx.compress import Calibration
    from hcx.compress.plan import SearchPlan
    from hcx.config.decode import decode
    from hcx.errors import ConfigError
    from hcx.recipe.bench_search import MEAN, measure, wins

    try:
        widths, drawn = [int(part) for part in bits.split(",")], [int(part) for part in seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--bits {bits}, --seeds {seeds}: expected comma-separated integers") from None
    if not all(2 <= width <= 8 for width in widths):
        raise ConfigError(f"--bits {bits}: 2 to 8; signed codes need at least 2")
    if min(drawn) < 0 or group_size < 8:
        raise ConfigError(f"--seeds {seeds}, --group-size {group_size}: seeds of at least 0, groups of at least 8")
    if quick:
        widths, drawn, rounds, tokens = widths[:1], drawn[:1], 1, min(tokens, 4096)
        max_documents = min(max_documents or 8, 8)
    search_settings = {"objective": objective, "feedback": feedback, "start": start, "noise": noise, "rounds": rounds}
    measured = measure(
        model,
        shards or training_shards(model),
        widths,
        drawn,
        group_size,
        decode(Calibration, {"tokens": tokens, "seq_len": 256}, "the command line"),
        decode(SearchPlan, search_settings, "the command line"),
        max_documents=max_documents,
        keep=keep,
    )
    rows = keep_rows(measured, out, lambda row: row.as_dict())
    if not write_rows([row.as_dict() for row in rows], None, as_json):
        return
    languages = list(dict.fromkeys(row.language for row in rows if row.language != MEAN))
    losses = {(row.bits, row.seed, row.candidate, row.language): row.loss for row in rows}
    table(
        f"held-out loss, nats per token, groups of {group_size}",
        ("bits, seed", "candidate", *languages, "mean", "less the clip of least squares", "evaluations"),
        [
            (
                f"{row.bits}, {row.seed}",
                row.candidate + (" (kept)" if row.chosen else ""),
                *(f"{losses[row.bits, row.seed, row.candidate, language]:.4f}" for language in languages),
                f"{row.loss:.4f}",
                f"{row.excess:+.4f} ({row.excess_low:+.4f} to {row.excess_high:+.4f})",
                f"{row.evaluations:,}" if row.candidate == "searched" else "",
            )
            for row in rows
            if row.language == MEAN
        ],
    )
    below, surely, count = wins(rows)
    echo(
        f"searched below the clip of least squared error in {below} of {count} cases, outside the interval in "
        f"{surely}; full precision: {next(row.loss_full for row in rows if row.language == MEAN):.4f}; "
        f"{rows[0].search_tokens:,} calibration tokens, {rows[-1].tokens:,} held-out tokens, {rows[0].device}"
    )
