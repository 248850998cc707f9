"""Progress of long work: rate and time left on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Shows `description  done/total  rate  time left` on one line of standard error when that is a terminal.

    Args:
        description: of the work.
        total: how much there is.
        unit: what is counted.
        done: what was done before; it is shown, and does not count for the rate.
    """

    def __init__(self, description: str, total: int, unit: str = "items", done: int = 0) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = self._before = done
        self._start = time.monotonic()
        self._shown = 0.0
        self._live = sys.stderr.isatty()

    def advance(self, count: int = 1) -> None:
        """Counts finished work and redraws at most five times a second."""
        self.done += count
        now = time.monotonic()
        if self._live and (now - self._shown > 0.2 or self.done >= self.total):
            self._shown = now
            rate = (self.done - self._before) / max(now - self._start, 1e-9)
            left = (self.total - self.done) / rate if rate > 0 else 0.0
            line = f"{self.description}  {self.done}/{self.total} {self.unit}  {rate:.1f}/s  {left:.0f} s left"
            sys.stderr.write("\r\x1b[2K" + line)
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
