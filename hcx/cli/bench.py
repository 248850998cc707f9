"""`hcx bench`: side-by-side measurements; rows are appended as CSV, and a table is printed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcx.cli.bench_evaluation import evaluation
from hcx.cli.bench_tokenizer import tokenizer
from hcx.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from hcx.kernels.bench import KernelCase


def register(app: typer.Typer) -> None:
    """Adds the verb with its kinds."""
    bench = typer.Typer(help="Measure side by side on this machine.", no_args_is_help=True)
    bench.callback()(lambda: None)
    bench.command("train")(train)
    bench.command("tokenizer")(tokenizer)
    bench.command("kernels")(kernels)
    bench.command("decode")(decode)
    bench.command("eval")(evaluation)
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


def kernels(
    quick: Annotated[
        bool, typer.Option("--quick", help="one matrix, decoding and a batch of 8, a minute or less")
    ] = False,
    shape: Annotated[str | None, typer.Option(help="OUTxIN instead of the usual shapes")] = None,
    batch: Annotated[str | None, typer.Option(help="batch sizes, comma-separated")] = None,
    threads: Annotated[int | None, typer.Option(help="of every contender")] = None,
    bits: Annotated[str | None, typer.Option(help="planes, comma-separated")] = None,
    resident: Annotated[bool, typer.Option("--resident", help="weights hot in a cache")] = False,
    peers: Annotated[str | None, typer.Option(help="onnxruntime, ggml; all that are here if not given")] = None,
    seconds: Annotated[float, typer.Option(help="per comparison")] = 10.0,
    plot: Annotated[
        Path | None, typer.Option(help="SVG file: fraction of the memory bound, of all rows in --out")
    ] = None,
    megabytes: Annotated[int, typer.Option(help="weights of each contender; more than the caches hold")] = 128,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Products with binary-coded weights beside a read of the same bytes, torch, and other libraries."""
    from hcx.errors import ConfigError
    from hcx.kernels.bench import cases, check_peers, measure
    from hcx.kernels.peers import available
    from hcx.obs import get_logger
    from hcx.report.kernel_plot import plot_kernels

    usual = cases(quick)
    if shape or batch or threads or bits or resident:
        usual = _kernel_cases(usual[0], shape, batch, threads, bits, resident)
    if plot is not None and out is None:
        raise ConfigError("--plot draws the rows of a CSV file: add --out FILE")
    if seconds <= 0 or megabytes < 1:
        raise ConfigError(f"--seconds {seconds}, --megabytes {megabytes}: must be positive")
    here = available()
    names = list(here) if peers is None else [name for name in peers.split(",") if name]
    check_peers(names, list(here))
    rows = []
    for case in usual:
        get_logger(__name__).info(
            "measuring %d x %d, batch %d, %d threads", case.out_features, case.in_features, case.batch, case.threads
        )
        rows += measure(case, min(seconds, 5.0) if quick else seconds, megabytes << 20, [here[name] for name in names])
    if out is not None:
        append_csv(out, [row.as_dict() for row in rows])
        if plot is not None:
            with open(out, newline="", encoding="utf-8") as file:
                plot_kernels(list(csv.DictReader(file)), plot)
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    for group in dict.fromkeys((row.out, row.in_, row.batch, row.threads, row.weights) for row in rows):
        own = [row for row in rows if (row.out, row.in_, row.batch, row.threads, row.weights) == group]
        table(
            f"{group[0]} x {group[1]}, batch {group[2]}, threads {group[3]}, weights from {group[4]}: microseconds",
            ("kernel", "bits", "numerics", "p2", "p50", "of floor", "error"),
            [
                (
                    row.kernel,
                    f"{row.bits:g}",
                    row.numerics,
                    f"{row.us_p2:,.0f}",
                    f"{row.us_p50:,.0f}",
                    "" if row.of_floor is None else f"{row.of_floor:.0%}",
                    f"{row.relative_error:.1e}",
                )
                for row in own
            ],
        )
    echo(f"{rows[0].device}, {rows[0].isa}, torch {rows[0].torch}; compare rows of one run only")


def _kernel_cases(
    usual: KernelCase, shape: str | None, batch: str | None, threads: int | None, bits: str | None, resident: bool
) -> list[KernelCase]:
    """Cases from options; what is not given is as in the usual case."""
    from hcx.errors import ConfigError
    from hcx.kernels.bench import KernelCase

    try:
        out, _, in_ = (shape or f"{usual.out_features}x{usual.in_features}").partition("x")
        sizes, planes = int(out), tuple(int(part) for part in bits.split(",")) if bits else usual.bits
        found = [
            KernelCase(sizes, int(in_), int(rows), threads or usual.threads, planes, resident)
            for rows in (batch or str(usual.batch)).split(",")
        ]
    except ValueError:
        raise ConfigError(
            f"--shape {shape}, --batch {batch}, --bits {bits}: expected OUTxIN and comma-separated integers"
        ) from None
    for case in found:
        if min(case.out_features, case.in_features, case.batch, case.threads) < 1 or case.in_features % 128:
            raise ConfigError(
                f"{case.out_features}x{case.in_features}, batch {case.batch}, {case.threads} threads: "
                "sizes must be positive, and the inputs a multiple of 128, the group of all contenders"
            )
        if not all(1 <= planes <= 8 for planes in case.bits):
            raise ConfigError(f"--bits {bits}: 1 to 8 planes are allowed")
    return found


def decode(
    model: Annotated[Path | None, typer.Argument(help="full-precision MODEL; random weights if not given")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few tokens")] = False,
    bits: Annotated[str, typer.Option(help="planes, comma-separated")] = "4,3,2",
    group_size: Annotated[int, typer.Option(help="inputs per scale")] = 64,
    numerics: Annotated[str, typer.Option(help="Kernels: reference, exact or fast.")] = "fast",
    context: Annotated[int, typer.Option(help="tokens read before")] = 64,
    tokens: Annotated[int, typer.Option(help="made by each contender")] = 100,
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
    rows = measure_decode(model, planes, numerics, group_size, context, min(tokens, 10) if quick else tokens)
    if out is not None:
        append_csv(out, [row.as_dict() for row in rows])
    if as_json:
        print_json([row.as_dict() for row in rows])
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


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows; a new file gets a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
