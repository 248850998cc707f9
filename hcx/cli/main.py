"""Entry point of the `hcx` command: registers the verbs and turns errors into exit codes.

Exit codes: 0 done; 2 the user's to mend (a message, no traceback); 75 interrupted and resumable; 1 our bug.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import typer

from hcx.errors import HcxError, PeerLost
from hcx.obs.log import setup_logging

EXIT_USER = 2
EXIT_RESUMABLE = 75

# typer used to depend on click and now carries a copy of it; its public BadParameter leads to the base class of either.
ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

VERBS: tuple[str, ...] = (
    "doctor",
    "demo",
    "house",
    "data",
    "tokenizer",
    "plan",
    "train",
    "launch",
    "tune",
    "convert",
    "compress",
    "evaluate",
    "generate",
    "chat",
    "serve",
    "bench",
    "report",
)


def build_app() -> typer.Typer:
    """The application with every verb; a verb's module imports nothing heavy until it runs."""
    app = typer.Typer(
        name="hcx",
        help="From raw Korean, English and code text to a served, measured, compressed language model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    # With a callback, verbs stay verbs even when only one of them is registered.
    app.callback()(lambda: None)
    for verb in VERBS:
        if importlib.util.find_spec(f"hcx.cli.{verb}") is not None:
            importlib.import_module(f"hcx.cli.{verb}").register(app)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with the documented codes."""
    setup_logging()
    try:
        code = build_app()(args=arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except HcxError as error:
        sys.stderr.write(f"hcx: {error}\n")
        sys.exit(EXIT_RESUMABLE if isinstance(error, PeerLost) else EXIT_USER)
    except ClickException as error:
        error.show()
        sys.exit(EXIT_USER)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("hcx: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`hcx eval --list | head`).
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
