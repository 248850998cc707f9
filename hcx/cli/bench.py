"""`hcx bench`: side-by-side measurements; rows are appended as CSV, and a table is printed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import typer

from hcx.cli.bench_tokenizer import tokenizer
from hcx.cli.output import echo, print_json, table


def register(app: typer.Typer) -> None:
    """Adds the verb with its kinds."""
    bench = typer.Typer(help="Measure side by side on this machine.", no_args_is_help=True)
    bench.callback()(lambda: None)
    bench.command("train")(train)
    bench.command("tokenizer")(tokenizer)
    app.add_typer(bench, name="bench")


def train(
    quick: Annotated[bool, typer.Option("--quick", help="one small case, few steps")] = False,
    pairs: Annotated[int, typer.Option(help="measured pairs of steps per case")] = 40,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Training tokens per second beside a plain torch loop over a transformers model of the same shape."""
    import torch

    from hcx.errors import ConfigError
    from hcx.obs import get_logger
    from hcx.recipe.bench_train import cases, measure

    if pairs < 5:
        raise ConfigError(f"--pairs {pairs}: an interval needs at least 5")
    rows = []
    for case in cases(quick, torch.cuda.is_available()):
        get_logger(__name__).info("measuring %s, %s, %d x %d", case.name, case.precision, case.rows, case.seq_len)
        rows.append(measure(case, min(pairs, 15) if quick else pairs))
    if out is not None:
        append_csv(out, [row.as_dict() for row in rows])
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    table(
        "training, tokens per second",
        ("case", "precision", "packed", "step", "hcx", "transformers", "ratio", "95 % interval"),
        [
            (
                row.case,
                row.precision,
                "yes" if row.packed else "no",
                f"{row.micro_batches} x {row.rows} x {row.seq_len}",
                f"{row.hcx_tokens_per_s:,.0f}",
                f"{row.transformers_tokens_per_s:,.0f}",
                f"{row.ratio:.3f}",
                f"{row.ratio_low:.3f} to {row.ratio_high:.3f}",
            )
            for row in rows
        ],
    )
    echo(f"{rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}, transformers {rows[0].transformers}")


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows; a new file gets a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
