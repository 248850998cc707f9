"""`hcx bench`: side-by-side measurements; rows are appended as CSV, and a table is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.bench_codes import fixed_to_fixed
from hcx.cli.bench_compress import compress
from hcx.cli.bench_digits import digits
from hcx.cli.bench_dropbp import bench_drops, bench_pipeline, dropbp
from hcx.cli.bench_engines import bench_engines
from hcx.cli.bench_evaluation import evaluation
from hcx.cli.bench_kernels import kernels
from hcx.cli.bench_methods import methods
from hcx.cli.bench_search import search
from hcx.cli.bench_seven_b import compress_seven_b
from hcx.cli.bench_tokenizer import tokenizer
from hcx.cli.output import echo, table, write_rows


def register(app: typer.Typer) -> None:
    """Adds the verb with its kinds."""
    bench = typer.Typer(help="Measure side by side on this machine.", no_args_is_help=True)
    bench.callback()(lambda: None)
    bench.command("train")(train)
    bench.command("dropbp")(dropbp)
    bench.command("tokenizer")(tokenizer)
    bench.command("kernels")(kernels)
    bench.command("decode")(decode)
    bench.command("fixed-to-fixed")(fixed_to_fixed)
    bench.command("compress")(compress)
    bench.command("compress-7b")(compress_seven_b)
    bench.command("search")(search)
    bench.command("eval")(evaluation)
    bench.command("methods")(methods)
    bench.command("digits")(digits)
    app.add_typer(bench, name="bench")


def train(
    quick: Annotated[bool, typer.Option("--quick", help="one small case, few steps")] = False,
    pairs: Annotated[int, typer.Option(help="measured pairs of steps per case")] = 40,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
    drops: Annotated[bool, typer.Option("--dropbp", help="what dropping backward passes saves, instead")] = False,
    pipeline: Annotated[bool, typer.Option("--pipeline", help="with --dropbp: two pipeline stages")] = False,
    engine: Annotated[
        str | None, typer.Option(help="deepspeed or megatron, beside the library's own loop, on two processes")
    ] = None,
) -> int:
    """Training tokens per second beside a plain torch loop over a transformers model of the same shape."""
    import torch

    from hcx.errors import ConfigError
    from hcx.obs import get_logger
    from hcx.recipe.bench_train import cases, measure

    if pairs < 5:
        raise ConfigError(f"--pairs {pairs}: an interval needs at least 5")
    if pipeline and not drops:
        raise ConfigError("--pipeline times dropped backward passes: add --dropbp")
    if engine is not None:
        if drops:
            raise ConfigError("--engine and --dropbp are two measurements; give one of them")
        return bench_engines(engine, quick, pairs, out, as_json)
    if drops:
        return bench_pipeline(quick, pairs, out, as_json) if pipeline else bench_drops(quick, pairs, out, as_json)
    rows = []
    for case in cases(quick, torch.cuda.is_available()):
        get_logger(__name__).info("measuring %s, %s, %d x %d", case.name, case.precision, case.rows, case.seq_len)
        rows.append(measure(case, min(pairs, 15) if quick else pairs))
    if not write_rows([row.as_dict() for row in rows], out, as_json):
        return 0
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
    return 0


def decode(
    model: Annotated[Path | None, typer.Argument(help="full-precision MODEL; random weights if not given")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few tokens")] = False,
    bits: Annotated[str, typer.Option(help="planes, comma-separated")] = "4,3,2",
    group_size: Annotated[int, typer.Option(help="inputs per scale")] = 64,
    numerics: Annotated[str, typer.Option(help="Kernels: reference, exact or fast.")] = "fast",
    context: Annotated[int, typer.Option(help="tokens read before")] = 64,
    tokens: Annotated[int, typer.Option(help="made by each contender")] = 100,
    output_bits: Annotated[
        int, typer.Option(help="planes of the output matrix in a second contender of each width; 0: none")
    ] = 8,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Tokens per second of one request, binary-coded and at full precision, beside a transformers bf16 loop."""
    from hcx.errors import ConfigError
    from hcx.kernels import NUMERICS
    from hcx.recipe.bench_decode import measure_decode

    try:
        planes = [int(part) for part in bits.split(",")]
    except ValueError:
        raise ConfigError(f"--bits {bits}: expected comma-separated integers") from None
    if numerics not in NUMERICS:
        raise ConfigError(f"--numerics {numerics}; valid: {', '.join(NUMERICS)}")
    if min(context, tokens) < 1:
        raise ConfigError(f"--context {context}, --tokens {tokens}: must be positive")
    if not 0 <= output_bits <= 8:
        raise ConfigError(f"--output-bits {output_bits}: must be 1 to 8, or 0 for a dense output alone")
    made = min(tokens, 10) if quick else tokens
    rows = measure_decode(model, planes, numerics, group_size, context, made, output_bits)
    if not write_rows([row.as_dict() for row in rows], out, as_json):
        return
    table(
        "decoding one request",
        ("contender", "bits", "numerics", "ms p2", "ms p50", "tokens/s", "in products"),
        [
            (
                row.contender,
                f"{row.bits:g}",
                row.numerics,
                f"{row.ms_p2:.2f}",
                f"{row.ms_p50:.2f}",
                f"{row.tokens_per_s:.1f}",
                "" if row.products is None else f"{row.products:.0%}",
            )
            for row in rows
        ],
    )
    echo(f"{rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}, transformers {rows[0].transformers}")
