"""`hcx bench fixed-to-fixed`: encoding and decoding speed of fixed-to-fixed codes, and how many bits they get right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, table, write_rows


def fixed_to_fixed(
    quick: Annotated[bool, typer.Option("--quick", help="one case, a million weights")] = False,
    weights: Annotated[int | None, typer.Option(help="of every case; 8 million, and 1 of two registers")] = None,
    threads: Annotated[int, typer.Option(help="of encoding and decoding")] = 1,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Planes of pruned weights as code words: encoding, decoding beside a copy of the same bytes, and efficiency."""
    from hcx.kernels.bench_codes import cases, measure
    from hcx.obs import get_logger

    rows = []
    for case in cases(quick, weights, threads):
        get_logger(__name__).info("measuring sparsity %g, %d registers", case.sparsity, case.n_s)
        rows.append(measure(case))
    if not write_rows([row.as_dict() for row in rows], out, as_json):
        return
    table(
        f"one plane of random bits, {rows[0].threads} threads",
        ("pruned", "n_in, n_out, n_s", "right bits", "bits per bit", "encode, core s", "decode GB/s", "copy GB/s"),
        [
            (
                f"{row.sparsity:.0%}",
                f"{row.n_in}, {row.n_out}, {row.n_s}",
                f"{row.efficiency:.2%}",
                f"{row.bits_per_bit:.4f}",
                f"{row.encode_core_s_100m_3:,.1f}",
                f"{row.decode_gb_per_s:.2f}",
                f"{row.copy_gb_per_s:.2f}",
            )
            for row in rows
        ],
    )
    echo(f"{rows[0].device}, {rows[0].isa}; encoding is stated for 100 million weights in 3 planes on one core")
