"""`python -m hcx.lm_eval`: lm-eval's own command with `--model hcx`, hcx's tasks, and BCQ for `--model hf`.

Example:
    python -m hcx.lm_eval run --model hcx --model_args pretrained=MODEL --tasks hcx_kmmlu_dev225
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from hcx.errors import HcxError, MissingExtra

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
    """Registers hcx with lm-eval and transformers, then runs lm-eval's command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra("lm-eval", "eval", "python -m hcx.lm_eval")
    from lm_eval.__main__ import cli_evaluate

    import hcx.evals.lm  # noqa: F401  (registers the model `hcx`)
    from hcx.evals.catalog import tasks_directory
    from hcx.model.convert.registration import register

    register()

    sys.argv = ["lm_eval", *arguments_with_tasks(given, str(tasks_directory()))]
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except HcxError as error:
        sys.stderr.write(f"hcx: {error}\n")
        sys.exit(2)
