"""`hcx bench train --engine`: the engines beside their libraries' own loops."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import cast

from hcx.cli.output import echo, keep_rows, table, write_rows
from hcx.errors import ConfigError, MissingExtra

PACKAGES = {"deepspeed": "deepspeed", "megatron": "megatron-core"}
QUICK_PAIRS = 10


def bench_engines(engine: str, quick: bool, pairs: int, out: Path | None, as_json: bool) -> int:
    """Times one engine's layouts on two processes, which it starts."""
    from hcx.dist import init_process_group, process_environment
    from hcx.dist.spawn import run_local_ranks, this_command
    from hcx.recipe.bench_engines import RANKS, WANTED, Library, measure_engines

    if engine not in PACKAGES:
        raise ConfigError(f"--engine {engine}; valid: {', '.join(PACKAGES)}")
    rank, world_size, _ = process_environment()
    if world_size == 1:
        if find_spec(engine) is None:
            raise MissingExtra(PACKAGES[engine], engine, f"hcx bench train --engine {engine}")
        return run_local_ranks(this_command(), RANKS)
    if world_size != RANKS:
        raise ConfigError(f"hcx bench train --engine runs on {RANKS} processes, not {world_size}")
    init_process_group()
    measured = measure_engines(cast("Library", engine), min(pairs, QUICK_PAIRS) if quick else pairs, quick)
    rows = keep_rows(measured, out if rank == 0 else None, lambda row: row.as_dict())
    if rank != 0 or not write_rows([row.as_dict() for row in rows], None, as_json):
        return 0
    table(
        f"{engine}: step time of the engine over that of the library's own loop",
        ("layout", "loop over", "hcx, ms", "loop, ms", "ratio", "95 % interval", f"at most {WANTED}"),
        [
            (
                row.layout,
                row.loop,
                f"{row.hcx_ms:.1f}",
                f"{row.loop_ms:.1f}",
                f"{row.ratio:.3f}",
                f"{row.ratio_low:.3f} to {row.ratio_high:.3f}",
                "yes" if row.met else "no",
            )
            for row in rows
        ],
    )
    first = rows[0]
    echo(
        f"{first.device}, {RANKS} processes of {first.threads} threads, fp32, torch {first.torch}; "
        f"{first.micro_batches} x {first.rows} x {first.seq_len} tokens per rank and step, {first.pairs} pairs"
    )
    return 0
