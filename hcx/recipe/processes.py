"""hcx commands in processes of their own: what a run holds (process groups, kernels, memory) ends with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from hcx.errors import TrainingError

RESUMABLE = 75
"""Exit code of a run that was told to stop."""


def run_command(words: Sequence[str]) -> str:
    """Runs `hcx WORDS` and returns what it printed.

    Raises:
        TrainingError: it failed; the message is the last line that it wrote.
        KeyboardInterrupt: it was told to stop; the caller stops too, and going on resumes it.
    """
    ended = subprocess.run([sys.executable, "-m", "hcx.cli.main", *words], capture_output=True, text=True, check=False)
    if ended.returncode == RESUMABLE:
        raise KeyboardInterrupt
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(f"hcx {words[0]} ended with {ended.returncode}: {last}")
    return ended.stdout
