"""`hcx bench train --dropbp` and `hcx bench dropbp`: what dropping the backward saves, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import append_csv, echo, print_json, table, write_rows
from hcx.errors import ConfigError

MIN_PAIRS = 5


def bench_drops(quick: bool, pairs: int, out: Path | None, as_json: bool) -> int:
    """Steps with and without drops, and the published mechanism with the same masks."""
    import torch

    from hcx.obs import get_logger
    from hcx.recipe.bench_dropbp import drop_cases, longest_sequence, measure_drop

    log = get_logger(__name__)
    rows = []
    for case in drop_cases(quick, torch.cuda.is_available()):
        log.info("%s, %s, rate %g, %d x %d", case.name, case.training, case.rate, case.rows, case.seq_len)
        rows.append(measure_drop(case, min(pairs, MIN_PAIRS) if quick else pairs))
        if out is not None:
            # Row by row: what was measured stays when a long run is stopped.
            append_csv(out, [rows[-1].as_dict()])
    if not write_rows([row.as_dict() for row in rows], None, as_json):
        return 0
    table(
        "step to that without drops, as measured/predicted; ours/published: time of forward and backward",
        ("case", "rate", "dropped", "total", "by time", "backward", "stored", "ours/published", "in bands"),
        [
            (
                f"{row.case} {row.training} {row.rows}x{row.seq_len}{' again' if row.checkpointing else ''}",
                f"{row.rate:g}" + ("" if row.rule == "exact" else f" {row.rule}"),
                f"{row.realised:.3f}",
                f"{row.total:.3f}/{row.total_predicted:.3f}",
                f"{row.total_predicted_by_time:.3f}",
                f"{row.backward:.3f}/{row.backward_predicted:.3f}",
                f"{row.stored:.3f}/{row.stored_predicted:.3f}",
                f"{row.over_published:.3f} ({row.over_published_low:.3f} to {row.over_published_high:.3f})",
                "yes" if row.inside else "by time" if row.inside_by_time else "no",
            )
            for row in rows
        ],
    )
    first = rows[0]
    echo("by time: predicted from how much longer than the forward the backward took, instead of from operations")
    echo("again: with activation checkpointing, kept sublayers computed again in the backward")
    echo(f"{first.device}, {first.precision}, {first.threads} threads, torch {first.torch}, {first.pairs} rounds")
    if torch.cuda.is_available() and not quick:
        lengths = {rate: longest_sequence(rate) for rate in (0.0, 0.875)}
        echo(f"longest row of a low-rank step: {lengths[0.0]:,} tokens at 0, {lengths[0.875]:,} at 0.875")
    return 0


def bench_pipeline(quick: bool, pairs: int, out: Path | None, as_json: bool) -> int:
    """Two pipeline stages, with equal drops per stage and without; starts its two processes."""
    from hcx.dist import init_process_group, process_environment
    from hcx.dist.spawn import run_local_ranks, this_command
    from hcx.errors import MissingExtra
    from hcx.recipe.bench_dropbp_pipeline import STAGES, WANTED, measure_pipeline

    rank, world_size, _ = process_environment()
    if world_size == 1:
        from importlib.util import find_spec

        if find_spec("megatron") is None:
            raise MissingExtra("megatron-core", "megatron", "hcx bench train --dropbp --pipeline")
        return run_local_ranks(this_command(), STAGES)
    if world_size != STAGES:
        raise ConfigError(f"hcx bench train --dropbp --pipeline runs on {STAGES} processes, not {world_size}")
    init_process_group()
    rows = []
    for rate in (0.5,) if quick else (0.5, 0.75):
        rows += measure_pipeline(rate, min(pairs, MIN_PAIRS) if quick else pairs, quick)
    if rank != 0:
        return 0
    if not write_rows([row.as_dict() for row in rows], out, as_json):
        return 0
    table(
        f"a pipeline of {STAGES} stages: step time to that without drops, and the share of the predicted saving",
        ("masks", "rate", "dropped", "ratio", "predicted", "reached", "95 % interval", f"at least {WANTED:.0%}"),
        [
            (
                row.masks,
                f"{row.rate:g}",
                f"{row.realised:.3f}",
                f"{row.ratio:.3f}",
                f"{row.ratio_predicted:.3f}",
                f"{row.reached:.0%}",
                f"{row.reached_low:.0%} to {row.reached_high:.0%}",
                "yes" if row.reached >= WANTED else "no",
            )
            for row in rows
        ],
    )
    first = rows[0]
    echo(f"{first.device}, {first.threads} threads per stage, torch {first.torch}, {first.micro_batches} micro-batches")
    return 0


def dropbp(
    recipe: Annotated[str, typer.Argument(help="YAML recipe, such as launch/train/dropbp-code.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=32")] = None,
    arms: Annotated[
        str,
        typer.Option(help="comma-separated, or all; freeze: lowest sublayers frozen, at the backward cost of 0.875"),
    ] = "none,0.5,0.875,0.875-sensitivity,freeze",
    seeds: Annotated[int, typer.Option(help="runs of each arm")] = 3,
    out: Annotated[Path | None, typer.Option(help="directory of the runs; the recipe's if not given")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
) -> None:
    """Held-out quality of fine-tuning with dropped backward passes, at equal steps and at equal time."""
    from dataclasses import asdict

    from hcx.artifacts import find_file
    from hcx.artifacts.durable import write_atomically
    from hcx.recipe import check_recipe, load_train_recipe
    from hcx.recipe.bench_dropbp_quality import ARMS, Figure, as_row, mean_curves, run_arms, summarise
    from hcx.report import plots

    loaded = load_train_recipe(find_file(recipe, "launch/train"), overrides or ())
    check_recipe(loaded)
    directory = out or Path(loaded.out)
    chosen = list(ARMS) if arms == "all" else [arm for arm in arms.split(",") if arm]
    points = run_arms(loaded, chosen, seeds, directory)
    table_file = directory / "points.csv"
    table_file.unlink(missing_ok=True)
    append_csv(table_file, [dict(as_row(point)) for point in points])
    metrics = list(dict.fromkeys(point.metric for point in points))
    for metric in metrics:
        for axis, lines in mean_curves(points, metric).items():
            svg = plots.curves(f"Held out, {metric}", axis, metric, lines)
            name = f"{metric.replace('/', '-')}-by-{axis}.svg"
            write_atomically(directory / name, plots.standalone(svg).encode())
    summaries = summarise(points)

    def spread(figure: Figure) -> str:
        return f"{figure.mean:.4f} ({figure.low:.4f} to {figure.high:.4f})"

    if as_json:
        print_json([asdict(summary) for summary in summaries])
        return
    table(
        f"{loaded.name}: means over {seeds} seeds (smallest to largest)",
        ("arm", "metric", "steps", "at the end", "seconds", "after equal seconds"),
        [
            (
                summary.arm,
                summary.metric,
                summary.steps,
                spread(summary.at_end),
                f"{summary.seconds.mean:.1f}",
                spread(summary.at_equal_time),
            )
            for summary in summaries
        ]
        + [(arm, "not run", "", "", "", "") for arm in ARMS if arm not in chosen],
    )
    echo(f"equal time: {summaries[0].equal_seconds:.1f} s of training; curves and points.csv in {directory}")
