"""Suite-wide settings: capability marks, and the minutes of each room against its budget."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

BUDGET_MINUTES = defaultdict(
    lambda: 2.0, {"engine": 6.0, "parity": 6.0, "main path": 6.0, "kernels": 3.0, "train": 3.0, "slurm": 3.0}
)
"""What each room may take on two cores; a room over its budget is shown as such in the summary."""

_seconds: dict[str, float] = defaultdict(float)


def _room(nodeid: str) -> str:
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 else "main path"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("slurm") and shutil.which("sbatch") is None:
            item.add_marker(pytest.mark.skip(reason="no SLURM controller (sbatch not found)"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[_room(report.nodeid)] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _seconds:
        return
    terminalreporter.section("minutes by room")
    for room, seconds in sorted(_seconds.items(), key=lambda entry: -entry[1]):
        minutes, budget = seconds / 60, BUDGET_MINUTES[room]
        over = "  OVER BUDGET" if minutes > budget else ""
        terminalreporter.write_line(f"{room:<14} {minutes:6.2f} of {budget:.0f} min{over}")
