"""`hcx bench eval`: scoring beside lm-eval's `hf` backend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import print_json, table


def evaluation(
    model: Annotated[Path, typer.Argument(help="A directory in Hugging Face's layout, full precision.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks of multiple choice, separated by commas.")] = (
        "hcx_kmmlu_dev225,hcx_mmlu_dev282"
    ),
    data: Annotated[Path | None, typer.Option(help="A bundle of hcx eval fetch.")] = None,
    limit: Annotated[int, typer.Option(help="Items of each task.")] = 100,
    repeats: Annotated[int, typer.Option(help="Measured rounds of both backends.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="Few items, one round.")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Seconds of scoring beside lm-eval's `hf` backend, same model and requests, and whether answers are equal."""
    from hcx.cli.bench import append_csv
    from hcx.evals.bench import measure

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    rows = measure(model, names, data, min(limit, 8) if quick else limit, 1 if quick else repeats, batch_size)
    if out is not None:
        append_csv(out, [row.as_dict() for row in rows])
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    table(
        "scoring, seconds",
        ("task", "items", "requests", "hcx", "hf", "ratio", "from to", "same answers", "largest difference"),
        [
            (
                row.task,
                str(row.items),
                str(row.requests),
                f"{row.hcx_s:.2f}",
                f"{row.hf_s:.2f}",
                f"{row.ratio:.2f}",
                f"{row.low:.2f} to {row.high:.2f}",
                "yes" if row.same_answers else "NO",
                f"{row.largest_difference:.1e}",
            )
            for row in rows
        ],
    )
