"""`hcx train`: a recipe to a trained model."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, print_json, table
from hcx.errors import LaunchError

if TYPE_CHECKING:
    from hcx.recipe import TrainRecipe

LOCAL_PROCESSES = 8
"""Processes that are started on one machine, however few its cores are."""


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("train")(train)


def train(
    recipe: Annotated[str, typer.Argument(help="YAML recipe, such as launch/train/demo.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as engine.zero_stage=2")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and print the resolved recipe, then stop")] = False,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint directory")] = "auto",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="a few tiny steps with every kind of parallelism, checked, then stop")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the outcome as JSON")] = False,
) -> int:
    """Trains as a recipe says; resumes by itself after an interruption (exit code 75)."""
    from hcx.artifacts import find_file, is_complete
    from hcx.config import dump_yaml
    from hcx.dist import process_environment
    from hcx.dist.spawn import run_local_ranks, this_command
    from hcx.model.flops import parameter_count
    from hcx.recipe import check_recipe, load_train_recipe

    loaded = load_train_recipe(find_file(recipe, "launch/train"), overrides or ())
    if rehearse:
        return _rehearse(loaded, as_json)
    rank, world_size, _ = process_environment()
    check_recipe(loaded, None if world_size == 1 else world_size)
    if dry_run:
        # The batch of conversations counts tokens already.
        per_sample = 1 if loaded.data.kind == "chat" else loaded.data.seq_len
        tokens = loaded.train.steps * loaded.train.global_batch * per_sample
        echo(dump_yaml(loaded))
        echo(f"# {parameter_count(loaded.model):,} parameters, {tokens:,} tokens, {loaded.world_size} processes: legal")
        return 0
    if world_size == 1 and loaded.world_size > 1:
        _refuse_a_cluster(loaded)
        return run_local_ranks(this_command(), loaded.world_size)

    from hcx.cli.main import EXIT_RESUMABLE
    from hcx.recipe.run import run_training

    result = run_training(loaded, resume)
    if rank == 0:
        figure = "loss" if loaded.data.kind == "chat" else "bits_per_byte"
        written = [f"{kind}: {path}" for kind in ("adapter", "model") if is_complete(path := Path(loaded.out, kind))]
        if as_json:
            print_json(
                {
                    "out": loaded.out,
                    "step": result.step,
                    "finished": result.finished,
                    "tokens": result.tokens,
                    "seconds": result.seconds,
                    figure: result.bits_per_byte,
                }
            )
        elif result.finished:
            rows = [(name, f"{value:.4f}") for name, value in result.bits_per_byte.items()]
            if figure == "loss":
                table("held-out conversations", ("source", "nats per trained token"), rows)
            else:
                table("held-out text", ("language", "bits per byte"), rows)
            echo("\n".join(written))
    return 0 if result.finished else EXIT_RESUMABLE


def _refuse_a_cluster(recipe: TrainRecipe) -> None:
    """Hundreds of processes on one machine help nobody."""
    most = max(LOCAL_PROCESSES, os.cpu_count() or 1)
    if recipe.world_size > most:
        raise LaunchError(
            f"{recipe.name} needs {recipe.world_size} processes, and at most {most} are started on one machine; start "
            "them by torchrun or SLURM on a cluster, or try the recipe here with --rehearse"
        )


def _rehearse(recipe: TrainRecipe, as_json: bool) -> int:
    from hcx.launch.rehearse import rehearse

    outcome = rehearse(recipe, say=(lambda line: None) if as_json else echo)
    if as_json:
        print_json(
            {
                "engine": outcome.rehearsal.engine.model_dump(mode="json"),
                "processes": outcome.rehearsal.world_size,
                "device": outcome.device,
                "reduced": list(outcome.rehearsal.reduced),
                "roles": [asdict(role) for role in outcome.roles],
                "loss_difference": outcome.difference,
                "resumed_difference": outcome.resumed,
                "bytes_by_rank": [{"weights": weights, "optimizer": optimizer} for weights, optimizer in outcome.held],
            }
        )
        return 0
    for precision, difference in outcome.difference.items():
        echo(f"{precision}: losses within {difference:.1e} of one process")
    echo(f"checkpoint: goes on in one process, losses within {outcome.resumed:.1e}")
    for rank, (weights, optimizer) in enumerate(outcome.held):
        echo(f"rank {rank}: {weights:,} bytes of weights, {optimizer:,} of optimizer: as planned")
    echo("rehearsed")
    return 0
