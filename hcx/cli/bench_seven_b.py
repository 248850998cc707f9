"""`hcx bench compress-7b`: a large random model through `hcx compress`, and the peers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import table, write_rows


def compress_seven_b(
    work: Annotated[Path, typer.Option(help="new directory for the model; removed at the end")],
    layers: Annotated[int, typer.Option(help="blocks of 7B shape; all 32 make 13.5 GB")] = 32,
    bits: Annotated[int, typer.Option(help="planes per weight")] = 3,
    group_size: Annotated[int, typer.Option("--group-size", help="inputs that share their scales")] = 128,
    method: Annotated[str, typer.Option(help="how the codes are chosen")] = "alternating",
    threads: Annotated[int, typer.Option(help="of every contender")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="two blocks of a small shape")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Time and peak memory of compressing a 7B-shaped model; plain rounding and HQQ (if installed) on its matrices."""
    from hcx.errors import ConfigError
    from hcx.recipe.bench_seven_b import SEVEN_B, measure_compress

    for name, value in (("--layers", layers), ("--threads", threads)):
        if value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    config = SEVEN_B
    if quick:
        small = {"hidden_size": 512, "intermediate_size": 1408, "num_heads": 8, "vocab_size": 4096}
        config, layers = SEVEN_B.model_copy(update=small), 2
    rows = measure_compress(work, layers, bits, group_size, method, threads, config)
    if not write_rows([row.as_dict() for row in rows], out, as_json):
        return
    table(
        f"{rows[0].parameters:,} parameters, {layers} blocks, {threads} threads, {rows[0].device}",
        ("contender", "method", "seconds", "peak GiB", "bits per weight", "relative error"),
        [
            (
                row.contender,
                row.method,
                f"{row.seconds:,.1f}",
                "" if row.peak_gib is None else f"{row.peak_gib:.2f}",
                "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}",
                "" if row.relative_error is None else f"{row.relative_error:.4f}",
            )
            for row in rows
        ],
    )
