"""`hcx bench digits`: fractions of a bit per weight against accuracy on an image task that ships in a package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, table, write_rows


def digits(
    seeds: Annotated[int, typer.Option(help="runs of each method")] = 3,
    out: Annotated[Path | None, typer.Option(help="append the rows to this CSV file")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a narrow network for two epochs: whether it runs")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """FleXOR at 0.4 to 1.2 bits per weight on scikit-learn's digits, beside 1-bit codes and dense weights."""
    from hcx.recipe.bench_digits import measure_digits

    sizes = {"width": 20, "epochs": 2} if quick else {}
    rows = [row.as_dict() for row in measure_digits(range(seeds), **sizes)]
    if not write_rows(rows, out, as_json):
        return
    table(
        f"test accuracy on 8 x 8 digits, {seeds} seeds; the matrix between two hidden layers is compressed",
        ("method", "bits per weight", "bytes with scales", "accuracy", "deviation"),
        [
            (
                row["method"],
                f"{row['bits_per_weight']:g}",
                f"{row['matrix_bytes']:,.0f}",
                f"{row['accuracy']:.2%}",
                f"{row['deviation']:.2%}",
            )
            for row in rows
        ],
    )
    echo("first and last layer are dense in all of them; scales count as fp32, one per row and plane")
