"""`hcx report`: one HTML page over what directories hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("report")(report)


def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="runs, models, evaluations; or above them")
    ],
    out: Annotated[Path | None, typer.Option(help="directory of the page; DIR/report if not given")] = None,
) -> None:
    """Writes one self-contained page: training, text, compression, evaluation, samples, and where it all came from."""
    from hcx.report import write_report

    echo(f"report: {write_report(directories, out or directories[0] / 'report')}")
