"""lm-eval's own command with hcx registered: what `python -m hcx.lm_eval` runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hcx.errors import MissingExtra
from hcx.evals.catalog import is_installed, tasks_directory

WITH_TASKS = ("run", "ls", "validate")


def arguments_with_tasks(arguments: Sequence[str], include: str) -> list[str]:
    """The command line with hcx's task folder added, unless the user names one."""
    given = list(arguments)
    if any(a == "--include_path" or a.startswith("--include_path=") for a in given):
        return given
    if given and (given[0] in WITH_TASKS or given[0].startswith("--model")):
        return [*given, "--include_path", include]
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Registers hcx with lm-eval and the binary-coded format with transformers, then runs lm-eval's command.

    Raises:
        MissingExtra: lm-eval is not installed.
    """
    if not is_installed("lm_eval"):
        raise MissingExtra("lm-eval", "eval", "python -m hcx.lm_eval")
    from lm_eval.__main__ import cli_evaluate

    import hcx.evals.lm  # noqa: F401  (registers the model `hcx`)
    from hcx.model.convert.registration import register

    register()
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.argv = ["lm_eval", *arguments_with_tasks(given, str(tasks_directory()))]
    cli_evaluate()
