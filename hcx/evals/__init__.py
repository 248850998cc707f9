"""Evaluation: lm-eval over our decoder, tasks from local data, and statistics that say what a small sample cannot.

Importing this package needs neither lm-eval nor sacrebleu; `HcxLM` and `evaluate` do.
"""

from typing import TYPE_CHECKING, Any

from hcx.evals.catalog import TaskCard, TaskStatus, find_tasks, load_suite, status_of, suite_names, task_cards

if TYPE_CHECKING:
    from hcx.evals.lm import HcxLM
    from hcx.evals.run import check, evaluate

__all__ = [
    "HcxLM",
    "TaskCard",
    "TaskStatus",
    "check",
    "evaluate",
    "find_tasks",
    "load_suite",
    "status_of",
    "suite_names",
    "task_cards",
]


def __getattr__(name: str) -> Any:
    if name == "HcxLM":
        from hcx.evals.lm import HcxLM

        return HcxLM
    if name in ("check", "evaluate"):
        from hcx.evals import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
