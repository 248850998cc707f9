"""`hcx tune`: searches named fields of a training recipe under a budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, print_json, table


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("tune")(tune)


def tune(
    recipe: Annotated[str, typer.Argument(help="YAML search, such as launch/tune/regularise.yaml")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the search and its recipe, then stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the trials as JSON")] = False,
) -> None:
    """Runs a training recipe with different values of named fields; writes trials.jsonl, best.yaml and surface.svg.

    A search that was stopped goes on where it was when it is started again.
    """
    from hcx.artifacts import find_file
    from hcx.recipe.tune import best_of, load_tune_recipe, search
    from hcx.report.surface import plot_search

    loaded = load_tune_recipe(find_file(recipe, "launch/tune"))
    if dry_run:
        fields = ", ".join(loaded.search)
        echo(f"{loaded.recipe}: {fields}; at most {loaded.trials} trials of {len(loaded.seeds)} seed(s): legal")
        return
    trials = search(loaded)
    best = best_of(trials)
    score = f"bits per byte, {loaded.score}"
    plot_search(trials, Path(loaded.out) / "surface.svg", score)
    if as_json:
        rows = [
            {"values": trial.values, "scores": trial.scores, "seconds": trial.seconds, "problem": trial.problem}
            for trial in trials
        ]
        print_json({"trials": rows, "best": best.values, "score": best.mean, "out": loaded.out})
        return
    table(
        f"{loaded.name}: {score}",
        ("trial", *loaded.search, "score", "spread over seeds", "seconds"),
        [
            (
                trial.number,
                *trial.values.values(),
                "failed" if trial.problem else f"{trial.mean:.4f}",
                "" if math.isnan(trial.spread) else f"{trial.spread:.4f}",
                f"{trial.seconds:.0f}",
            )
            for trial in trials
        ],
    )
    echo(f"best: {' '.join(f'{name}={value}' for name, value in best.values.items())}")
    echo(f"picture: {Path(loaded.out) / 'surface.svg'}")
