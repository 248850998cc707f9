"""`hcx launch`: runs on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, print_json


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    group = typer.Typer(no_args_is_help=True, help="Submits runs to a cluster.")
    # With a callback, `slurm` stays a word of its own although it is the only one.
    group.callback()(lambda: None)
    group.command("slurm")(slurm)
    app.add_typer(group, name="launch")


def slurm(
    recipe: Annotated[str, typer.Argument(help="YAML recipe of a training run, such as launch/train/demo.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as engine.data_parallel=16")] = None,
    nodes: Annotated[int, typer.Option(help="nodes to ask for")] = 1,
    profile: Annotated[str | None, typer.Option(help="cluster profile: a file, or a name in slurm/profiles/")] = None,
    array: Annotated[
        str | None, typer.Option(help="key=value,value,...: a job array that trains once for each value")
    ] = None,
    then_eval: Annotated[
        str | None, typer.Option("--then-eval", metavar="SUITE", help="evaluate the model when training has ended well")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the batch files and commands, then stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers of the jobs as JSON")] = False,
) -> None:
    """Trains on a SLURM cluster: checks the recipe, writes the batch file, submits it, and says what it did."""
    from hcx.artifacts import find_file, resource_names
    from hcx.errors import ConfigError
    from hcx.launch.slurm import parse_array, plan_launch
    from hcx.launch.slurm_config import PROFILES, load_slurm_profile
    from hcx.launch.submit import sbatch_command, submit

    if profile is None:
        shipped = ", ".join(Path(name).stem for name in resource_names(PROFILES))
        raise ConfigError(f"--profile: name a cluster profile, your own file or a shipped one ({shipped})")
    launch = plan_launch(
        find_file(recipe, "launch/train"),
        overrides or (),
        nodes,
        load_slurm_profile(profile),
        array=None if array is None else parse_array(array),
        suite=then_eval,
    )
    if dry_run:
        for job in (launch.train, launch.evaluation):
            if job is not None:
                echo(f"# {job.script}\n{job.text}")
        echo("# would run:\n# " + " ".join(sbatch_command(launch.train)))
        if launch.evaluation is not None:
            echo("# " + " ".join(sbatch_command(launch.evaluation, "JOB")))
        return
    submitted = submit(launch, lambda line: None if as_json else echo(line))
    runs = [str(run) for run in launch.train.runs]
    if as_json:
        print_json({"train": submitted.train, "evaluation": submitted.evaluation, "runs": runs})
        return
    echo(f"submitted job {submitted.train}: {nodes} nodes, {launch.world_size} processes for each run")
    if submitted.evaluation is not None:
        echo(
            f"submitted job {submitted.evaluation}, which evaluates the model when job {submitted.train} has ended well"
        )
    log = launch.directory.parent / f"slurm-train-{submitted.train}{'_*' if array else ''}.out"
    echo(
        f"look: squeue --jobs={submitted.train}; tail -f {log}; end: scancel {submitted.train} (launch again to resume)"
    )
