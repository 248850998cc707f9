"""`hcx eval`: scores with intervals, and which tasks can run here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hcx.cli.evaluate_verbs import OTHER_VERBS, Request
from hcx.cli.output import echo, print_json
from hcx.errors import EvalError

LM_EVAL_LINE = "hcx.lm_eval_line"
"""Key of a context's `meta` under which a command line of lm-eval's waits."""


class EvalCommand(TyperCommand):
    """The verb in its own form; a line in lm-eval's goes whole to lm-eval's parser."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Sets a line of lm-eval's aside, so that each parser sees its own flags only."""
        from hcx.evals.lm_eval_flags import is_lm_eval_line

        if is_lm_eval_line(args):
            ctx.meta[LM_EVAL_LINE] = list(args)
            args = []
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Adds the verb."""

    @app.command("eval", cls=EvalCommand)
    def evaluate(
        context: typer.Context,
        model: Annotated[
            Path | None, typer.Argument(help="A model directory, full precision or BCQ; or fetch, table, redteam, ...")
        ] = None,
        rest: Annotated[list[str] | None, typer.Argument(help="What fetch, table, redteam, ... work on.")] = None,
        suite: Annotated[
            str | None, typer.Option(help="A list of tasks by name: demo (default), korean, hcx-report, ...")
        ] = None,
        tasks: Annotated[str | None, typer.Option(help="Names of tasks, separated by commas.")] = None,
        limit: Annotated[int | None, typer.Option(help="Only the first items of each task.")] = None,
        out: Annotated[Path | None, typer.Option(help="New directory for results.json and the samples.")] = None,
        data: Annotated[
            Path | None, typer.Option(help="A bundle of hcx eval fetch, or a folder of item files.")
        ] = None,
        source: Annotated[
            Path | None, typer.Option("--from", help="A folder of published files instead of a bundle.")
        ] = None,
        language: Annotated[str, typer.Option(help="table: ko or en.")] = "en",
        against: Annotated[Path | None, typer.Option(help="contamination: training text, JSON lines.")] = None,
        poll: Annotated[float | None, typer.Option(help="watch: go on, looking every so many seconds.")] = None,
        deterministic: Annotated[bool, typer.Option(help="The same bits at any batch size; slower.")] = False,
        batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
        adapter: Annotated[
            Path | None, typer.Option(help="Adapter directory: PEFT's form, or an AlphaTuning task.")
        ] = None,
        numerics: Annotated[str, typer.Option(help="reference, exact or fast.")] = "reference",
        device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
        dtype: Annotated[str | None, typer.Option(help="float32, bfloat16; the model's own if not given.")] = None,
        listing: Annotated[bool, typer.Option("--list", help="List the tasks and whether they can run here.")] = False,
        check: Annotated[bool, typer.Option("--check", help="Load every task and build one request of each.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output, for scripts.")] = False,
    ) -> None:
        """Evaluate a model: bits per byte, knowledge, translation, each with its interval.

        Also: `hcx eval --list`, `hcx eval --check`, `hcx eval fetch SUITE... --out BUNDLE`,
        `hcx eval table RESULTS...`, `hcx eval contamination SUITE... --against FILE`, `hcx eval redteam LOG --out DIR`,
        `hcx eval fit-toxicity FILE --out SCORER`, `hcx eval watch RUN --suite NAME --out DIR`.
        Only `fetch` uses a network.

        A command line of lm-eval works here too: `hcx eval --model hcx --model_args pretrained=MODEL --tasks ...`, with
        `--data BUNDLE` for its data; `hcx eval run --help` lists those flags.
        """
        if LM_EVAL_LINE in context.meta:
            from hcx.evals.command import run_line

            run_line(context.meta[LM_EVAL_LINE])
            return
        names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else None
        if names == []:
            raise EvalError("--tasks is empty; see hcx eval --list")
        if listing or check:
            _look(names, suite, source, data, listing, as_json)
        elif model is None:
            raise EvalError("name a model directory, or use --list or --check")
        elif str(model) in OTHER_VERBS and not model.exists():
            OTHER_VERBS[str(model)](
                Request(tuple(rest or ()), out, source, data, language, against, as_json, names, limit, suite, poll)
            )
        elif rest:
            raise EvalError(f"{rest[0]!r} after {str(model)!r}: give one model; other work: {', '.join(OTHER_VERBS)}")
        else:
            from hcx.evals import evaluate as run
            from hcx.evals.fetch import data_from
            from hcx.evals.run import DEFAULT_SUITE, choose

            with data_from(names or [suite or DEFAULT_SUITE], source, data) as found:
                choose(names, suite, limit, found)
                if out is None:
                    raise EvalError("--out: give a new directory for the results")
                results = run(
                    model,
                    tasks=names,
                    suite=suite,
                    out=out,
                    limit=limit,
                    batch_size=batch_size,
                    numerics=numerics,
                    data=found,
                    device=device,
                    dtype=dtype,
                    adapter=adapter,
                    deterministic=deterministic,
                )
            if as_json:
                print_json(results)
            else:
                _show(results, out)


def _look(
    names: list[str] | None, suite: str | None, source: Path | None, data: Path | None, listing: bool, as_json: bool
) -> None:
    """`--list` and `--check`: all tasks, or those that are named, with the data that a run would have."""
    from hcx.evals.catalog import load_suite, require_tasks_or_suite, task_cards
    from hcx.evals.fetch import data_from

    require_tasks_or_suite(names, suite)
    if suite is not None:
        names = [task.name for task in load_suite(suite).tasks]
    wanted = names or list(task_cards())
    with data_from(wanted, source, data) as found:
        (_list if listing else _check)(wanted, found, as_json)


def _list(names: list[str], data: Path | None, as_json: bool) -> None:
    from hcx.evals.catalog import find_tasks, status_of

    rows = [status_of(card, data) for card in find_tasks(names)]
    if as_json:
        print_json([row.to_json() for row in rows])
        return
    columns = ("task", "suite", "language", "category", "status")
    _columns(columns, [(r.name, r.suite, r.language, r.category, r.status) for r in rows])
    for row in rows:
        if row.reason:
            echo(f"{row.name}: {row.reason}")


def _check(names: list[str], data: Path | None, as_json: bool) -> None:
    from hcx.evals import check
    from hcx.evals.run import is_healthy

    rows = check(names, data)
    if as_json:
        print_json(rows)
    else:
        _columns(("task", "status", "items"), [(r["name"], r["status"], str(r["items"] or "")) for r in rows])
        for row in rows:
            if row["reason"]:
                echo(f"{row['name']}: {row['reason']}")
    if not is_healthy(rows):
        raise typer.Exit(2)


def _show(results: dict[str, Any], out: Path) -> None:
    from hcx.evals.run import summary

    _columns(("task", "metric", "value", "stderr", "95 % interval", "items", ""), summary(results))
    for name, why in results["skipped"].items():
        echo(f"not run: {name}: {why}")
    for name, why in results["not_scored"].items():
        echo(f"not scored: {name}: {why}")
    echo(f"results: {out / 'results.json'}")


def _columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain columns that are never cut: names and intervals are what the table is for."""
    lines = [tuple(titles), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    for line in lines:
        echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
