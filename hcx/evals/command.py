"""lm-eval's own command with hcx registered: what `python -m hcx.lm_eval` runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from hcx.errors import EvalError, MissingExtra
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


ALLOW_CODE = "--allow-code"


def without_foreign_code(arguments: Sequence[str]) -> list[str]:
    """The command line for lm-eval, once its task folders hold no code or the user allows it.

    Task files name functions (`!function`) and lie beside modules that are imported: such a folder is a program.

    Raises:
        EvalError: a folder holds code and `--allow-code` is not given.
    """
    given = [argument for argument in arguments if argument != ALLOW_CODE]
    if len(given) < len(arguments):
        return given
    named = [a.split("=", 1)[1] for a in given if a.startswith("--include_path=")]
    named += [value for flag, value in pairwise(given) if flag == "--include_path"]
    own = tasks_directory().resolve()
    for folder in (Path(name) for name in named):
        if folder.resolve().is_relative_to(own) or not folder.is_dir():
            continue
        for path in sorted(folder.rglob("*")):
            is_task = path.suffix in (".yaml", ".yml") or path.name.endswith("_yaml")
            if path.suffix == ".py" or (is_task and "!function" in path.read_text(encoding="utf-8", errors="replace")):
                raise EvalError(
                    f"{folder}: holds code ({path.name}) that would run here; read it, then give {ALLOW_CODE}"
                )
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Registers hcx with lm-eval and the binary-coded format with transformers, then runs lm-eval's command.

    Raises:
        MissingExtra: lm-eval is not installed.
        EvalError: a task folder holds code and `--allow-code` is not given.
    """
    if not is_installed("lm_eval"):
        raise MissingExtra("lm-eval", "eval", "python -m hcx.lm_eval")
    from lm_eval.__main__ import cli_evaluate

    import hcx.evals.lm  # noqa: F401  (registers the model `hcx`)
    from hcx.model.convert.registration import register

    register()
    given = without_foreign_code(sys.argv[1:] if arguments is None else arguments)
    sys.argv = ["lm_eval", *arguments_with_tasks(given, str(tasks_directory()))]
    cli_evaluate()
