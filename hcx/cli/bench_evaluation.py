"""`hcx bench eval`: scoring beside lm-eval's `hf` backend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import keep_rows, table, write_rows

LETTERS = ("hcx_kmmlu_dev225", "hcx_mmlu_dev282")
"""What is scored where no task is named: they need no data but lm-eval."""

PUBLISHED = (
    "kobest_boolq",
    "kobest_hellaswag",
    "kobest_wic",
    "hcx_klue_nli",
    "hcx_klue_sts",
    "hcx_nsmc",
    "hcx_bbq",
    "hcx_korean_hate_speech",
    "hcx_kosbi",
    "hcx_square_question",
    "hcx_square_response",
    "hcx_hh_harmless",
)
"""Tasks of multiple choice in the suite `published`, compared where its files are named."""


def evaluation(
    model: Annotated[Path, typer.Argument(help="A directory in Hugging Face's layout, full precision.")],
    tasks: Annotated[str | None, typer.Option(help="Names of tasks of multiple choice, separated by commas.")] = None,
    data: Annotated[Path | None, typer.Option(help="A bundle of hcx eval fetch.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="A folder of published files instead.")] = None,
    compared: Annotated[bool, typer.Option("--compare", help="No timing: each item once under both.")] = False,
    limit: Annotated[int | None, typer.Option(help="Items of each task; 100 if not given, --compare: all.")] = None,
    repeats: Annotated[int, typer.Option(help="Measured rounds of both backends.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="Few items, one round.")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Seconds of scoring beside lm-eval's `hf` backend, same model and requests, and whether answers are equal."""
    from hcx.evals.bench import measure
    from hcx.evals.fetch import data_from

    if tasks is None:
        names = [*LETTERS, *PUBLISHED] if source is not None and compared else list(LETTERS)
    else:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
    if compared:
        with data_from(names, source, data) as found:
            _compare(model, names, found, limit, batch_size, out, as_json)
        return
    items = 100 if limit is None else limit
    with data_from(names, source, data) as found:
        timed = measure(model, names, found, min(items, 8) if quick else items, 1 if quick else repeats, batch_size)
        rows = keep_rows(timed, out, lambda row: row.as_dict())
    if not write_rows([row.as_dict() for row in rows], None, as_json):
        return
    table(
        "scoring, seconds",
        ("task", "items", "requests", "hcx", "hf", "ratio", "from to", "same answers", "largest difference"),
        [
            (
                row.task,
                str(row.items),
                str(row.requests),
                f"{row.hcx_s:.2f}",
                f"{row.hf_s:.2f}",
                f"{row.ratio:.2f}",
                f"{row.low:.2f} to {row.high:.2f}",
                "yes" if row.same_answers else "NO",
                f"{row.largest_difference:.1e}",
            )
            for row in rows
        ],
    )


def _compare(
    model: Path,
    names: list[str],
    data: Path | None,
    limit: int | None,
    batch_size: int,
    out: Path | None,
    as_json: bool,
) -> None:
    from hcx.evals.bench import compare

    rows = keep_rows(
        compare(model, names, data, limit, batch_size),
        out,
        lambda row: {**row.as_dict(), "differing": " ".join(row.differing)},
    )
    if write_rows([row.as_dict() for row in rows], None, as_json):
        table(
            "answers beside lm-eval's hf backend",
            ("task", "items", "requests", "items that differ", "greedy that differ", "largest difference"),
            [
                (
                    row.task,
                    str(row.items),
                    str(row.requests),
                    ", ".join(row.differing) or "none",
                    str(row.differing_greedy),
                    f"{row.largest_difference:.1e}",
                )
                for row in rows
            ],
        )
    if any(row.differing for row in rows):
        raise typer.Exit(1)
