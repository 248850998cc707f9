"""`hcx doctor`: what works on this machine, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, print_json

if TYPE_CHECKING:
    from hcx.launch.doctor import Check

MARKS = {"ok": "ok", "absent": "--", "broken": "BROKEN"}


def register(app: typer.Typer) -> None:
    """Adds the verb."""

    @app.command("doctor")
    def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False) -> None:
        """What works on this machine, and why not.

        Exit code 0 when hcx can work here, also with optional parts absent; 2 when something it needs is broken.
        """
        from hcx.launch.doctor import examine, is_healthy

        findings = examine()
        healthy = is_healthy(findings)
        if as_json:
            print_json({"healthy": healthy, "checks": [check.to_json() for check in findings]})
        else:
            _show(findings)
            echo()
            echo("hcx can work here." if healthy else "hcx cannot work here: mend what is marked BROKEN.")
        if not healthy:
            raise typer.Exit(2)


def _show(findings: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "absent": "yellow", "broken": "bold red"}
    area = ""
    view = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for column in ("status", "name", "value"):
        view.add_column(column, overflow="fold", no_wrap=column == "status")
    for check in findings:
        if check.area != area:
            if area:
                view.add_row("", "", "")
            view.add_row("", Text(check.area, style="bold"), "")
            area = check.area
        value = Text(check.value)
        if check.reason:
            value.append(f" ({check.reason})" if check.value else check.reason, style="dim")
        view.add_row(Text(MARKS[check.status], style=styles[check.status]), "  " + check.name, value)
    Console(highlight=False).print(view)
