"""`hcx bench kernels`: products with binary-coded weights beside other libraries, on a CPU or a GPU."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcx.cli.output import append_csv, echo, table, write_rows

if TYPE_CHECKING:
    from hcx.kernels.bench import KernelRow
    from hcx.kernels.bench_gpu import GpuRow


def kernels(
    quick: Annotated[
        bool, typer.Option("--quick", help="one matrix, decoding and a batch of 8, a minute or less")
    ] = False,
    shape: Annotated[str | None, typer.Option(help="OUTxIN instead of the usual shapes")] = None,
    batch: Annotated[str | None, typer.Option(help="batch sizes, comma-separated")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; what is chosen there is measured by itself")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="of every contender, on a CPU")] = None,
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
    from hcx.report.kernel_plot import plot_kernels

    if plot is not None and out is None:
        raise ConfigError("--plot draws the rows of a CSV file: add --out FILE")
    if seconds <= 0 or megabytes < 1:
        raise ConfigError(f"--seconds {seconds}, --megabytes {megabytes}: must be positive")
    asked = _Asked(quick, shape, batch, threads, bits, resident, peers, seconds, megabytes << 20)
    if device == "cuda":
        rows: list[Any] = _on_gpu(asked)
    elif device == "cpu":
        rows = _on_cpu(asked)
    else:
        raise ConfigError(f"--device {device}: valid are cpu and cuda")
    if out is not None:
        append_csv(out, [row.as_dict() for row in rows])
        if plot is not None:
            with open(out, newline="", encoding="utf-8") as file:
                plot_kernels(list(csv.DictReader(file)), plot)
    if not write_rows([row.as_dict() for row in rows], None, as_json):
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


@dataclass(frozen=True)
class _Asked:
    """The options of `hcx bench kernels` that say what is measured."""

    quick: bool
    shape: str | None
    batch: str | None
    threads: int | None
    bits: str | None
    resident: bool
    peers: str | None
    seconds: float
    size_bytes: int

    @property
    def is_usual(self) -> bool:
        return not (self.shape or self.batch or self.threads or self.bits or self.resident)

    def sizes(
        self, out_features: int, in_features: int, batch: int, bits: tuple[int, ...]
    ) -> list[tuple[int, int, int, tuple[int, ...]]]:
        """(out, in, batch, bits) of each case; what was not asked for is as given."""
        from hcx.errors import ConfigError

        try:
            out, _, in_ = (self.shape or f"{out_features}x{in_features}").partition("x")
            planes = tuple(int(part) for part in self.bits.split(",")) if self.bits else bits
            found = [(int(out), int(in_), int(rows), planes) for rows in (self.batch or str(batch)).split(",")]
        except ValueError:
            raise ConfigError(
                f"--shape {self.shape}, --batch {self.batch}, --bits {self.bits}: expected OUTxIN and "
                "comma-separated integers"
            ) from None
        for rows, columns, size, _ in found:
            if min(rows, columns, size) < 1 or columns % 128:
                raise ConfigError(
                    f"{rows}x{columns}, batch {size}: sizes must be positive, and the inputs a multiple of 128, the "
                    "group of all contenders"
                )
        if not all(1 <= count <= 8 for count in planes):
            raise ConfigError(f"--bits {self.bits}: 1 to 8 planes are allowed")
        return found


def _on_cpu(asked: _Asked) -> list[KernelRow]:
    from hcx.errors import ConfigError
    from hcx.kernels.bench import KernelCase, cases, check_peers, measure
    from hcx.kernels.peers import available
    from hcx.obs import get_logger

    usual = cases(asked.quick)
    if not asked.is_usual:
        like, threads = usual[0], asked.threads or usual[0].threads
        if threads < 1:
            raise ConfigError(f"--threads {threads}: must be positive")
        usual = [
            KernelCase(out, in_, batch, threads, bits, asked.resident)
            for out, in_, batch, bits in asked.sizes(like.out_features, like.in_features, like.batch, like.bits)
        ]
    here = available()
    names = list(here) if asked.peers is None else [name for name in asked.peers.split(",") if name]
    check_peers(names, list(here))
    rows = []
    for case in usual:
        get_logger(__name__).info(
            "measuring %d x %d, batch %d, %d threads", case.out_features, case.in_features, case.batch, case.threads
        )
        seconds = min(asked.seconds, 5.0) if asked.quick else asked.seconds
        rows += measure(case, seconds, asked.size_bytes, [here[name] for name in names])
    return rows


def _on_gpu(asked: _Asked) -> list[GpuRow]:
    from hcx.errors import ConfigError
    from hcx.kernels.bench_gpu import GpuCase, cases, measure
    from hcx.obs import get_logger

    if asked.threads or asked.resident or asked.peers is not None:
        raise ConfigError("--threads, --resident and --peers are of --device cpu; leave them out")
    usual = cases(asked.quick)
    if not asked.is_usual:
        like = usual[0]
        sizes = asked.sizes(like.out_features, like.in_features, like.batch, like.bits)
        usual = [GpuCase(*size) for size in sizes]
    rows = []
    for case in usual:
        get_logger(__name__).info("measuring %d x %d, batch %d", case.out_features, case.in_features, case.batch)
        outcome = measure(case)
        rows += outcome.rows
        for name, reason in outcome.left_out.items():
            get_logger(__name__).warning("%s is left out: %s", name, reason)
    return rows
