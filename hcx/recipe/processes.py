"""hcx commands in processes of their own: what a run holds (process groups, kernels, memory) ends with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

from hcx.errors import TrainingError

RESUMABLE = 75
"""Exit code of a run that was told to stop."""
THREADS = "OMP_NUM_THREADS"


def run_command(words: Sequence[str]) -> str:
    """Runs `hcx WORDS` and returns what it printed; see `Commands`."""
    return Commands()(words)


class Commands:
    """Runs hcx commands, beside each other where several threads call it.

    Args:
        threads: CPU threads of each, where the environment names no number; None: as many as it likes.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def __call__(self, words: Sequence[str]) -> str:
        """Runs `hcx WORDS` and returns what it printed.

        Raises:
            TrainingError: it failed; the message is the last line that it wrote.
            KeyboardInterrupt: it was told to stop; the caller stops too, and going on resumes it.
        """
        environment = dict(os.environ)
        if self._threads is not None:
            environment.setdefault(THREADS, str(self._threads))
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                [sys.executable, "-m", "hcx.cli.main", *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            self._running.add(process)
        try:
            printed, told = process.communicate()
        except BaseException:
            # The terminal may have told this process alone. A run that is told saves before it ends.
            process.terminate()
            with contextlib.suppress(KeyboardInterrupt):
                process.communicate()
            raise
        finally:
            with self._lock:
                self._running.discard(process)
        # One that was stopped before it could save has nothing to say.
        if process.returncode == RESUMABLE or self._stopped:
            raise KeyboardInterrupt
        if process.returncode != 0:
            last = (told.strip().splitlines() or ["no message"])[-1]
            raise TrainingError(f"hcx {words[0]} ended with {process.returncode}: {last}")
        return printed

    def stop(self) -> None:
        """Tells all commands to save and end, and starts no others."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
