"""`hcx bench methods`: ways to a compressed model beside each other, on one task, over seeds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from hcx.recipe.comparison_cell import Made

PROMPT = "파일을 저장하려면"


def methods(
    recipe: Annotated[str, typer.Argument(help="YAML comparison, such as launch/bench/alphatuning-code.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as seeds=[0]")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="training runs beside each other, each with its share of the CPU's threads")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check every recipe, count models, then stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Trains, compresses and scores every method in every format; writes table.md, table.csv, comparison.json and .svg.

    What is missing (weights, shards) is made first. A comparison that was stopped goes on where it was when it is
    started again: finished cells are kept.
    """
    import json

    from hcx.artifacts import find_file
    from hcx.recipe.compare import Run, check_comparison
    from hcx.recipe.comparison import load_comparison
    from hcx.report.comparison import COLUMNS, FACTS, PICTURE, TABLE, table_rows, write_comparison

    loaded = load_comparison(find_file(recipe, "launch/bench"), overrides or ())
    if dry_run:
        echo(f"{loaded.recipe}: {check_comparison(loaded)} models of {len(loaded.methods)} methods: legal")
        return
    out = Path(loaded.out)
    run = Run(loaded, jobs=jobs)
    try:
        results = run.run()
    finally:
        # Also when it is stopped: what was measured so far is a table, too.
        write_comparison(run.results(), out, loaded.name)
    made = run.served()
    page = None if made is None else _serve(made, out)
    if as_json:
        print_json(json.loads((out / FACTS).read_text(encoding="utf-8")))
    else:
        shown = [index for index, name in enumerate(COLUMNS) if name not in ("by part", "accuracy")]
        rows = [[cells[index] for index in shown] for cells in table_rows(results)]
        table(loaded.name, [COLUMNS[index] for index in shown], rows)
        echo(f"table: {out / TABLE}   picture: {out / PICTURE}" + ("" if page is None else f"   report: {page}"))


def _serve(made: Made, out: Path) -> Path:
    """Serves a model, asks it for a completion, and writes a page over its run and what it answered."""
    from hcx.artifacts import artifact_input, new_artifact
    from hcx.cli.client import get, post, running_server
    from hcx.report import write_report
    from hcx.report.comparison import FACTS
    from hcx.report.schema import ServedRequest, Serving

    with running_server(made.model, out / "serve.log") as port:
        described = get(port, "/v1/models")["data"][0]
        begun = time.perf_counter()
        answer = post(port, "/v1/completions", {"model": described["id"], "prompt": PROMPT, "max_tokens": 40})
        seconds = time.perf_counter() - begun
    serving = Serving(
        model=made.model.parent.name,
        numerics=str(described["numerics"]),
        backend=", ".join(described["kernels"]),
        requests=(
            ServedRequest(
                title="completion",
                prompt=PROMPT,
                text=answer["choices"][0]["text"],
                tokens=answer["usage"]["completion_tokens"],
                seconds=seconds,
            ),
        ),
    )
    inputs = [artifact_input("model", made.model)]
    with new_artifact(out / "serving", "serving", {}, inputs, overwrite=True) as artifact:
        (artifact.path / "serving.json").write_text(serving.model_dump_json(indent=1) + "\n", encoding="utf-8")
    # The page is about one run of many, so it is given the table and not the directory of them all.
    with new_artifact(out / "methods", "methods", {}, overwrite=True) as artifact:
        (artifact.path / FACTS).write_bytes((out / FACTS).read_bytes())
    return write_report([made.run or made.model, out / "serving", out / "methods"], out / "report")
