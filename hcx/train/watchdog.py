"""Names a rank that has stopped making progress, with its stack, and ends a run that hangs.

In a distributed run one stuck rank stops all of them, inside a collective that says nothing. Every rank therefore has a
watchdog of its own that knows what the rank was doing: of the reports that they leave, the one that is not waiting for
the others is the one to look at.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from hcx.obs import get_logger

log = get_logger(__name__)

EXIT_STALLED = os.EX_TEMPFAIL
"""The run is resumable from its last good checkpoint (75, as after a signal)."""


def end_process(message: str) -> None:
    """Ends the process at once: its main thread hangs, perhaps in a library, and cannot be asked to."""
    sys.stderr.write(f"hcx: {message}\n")
    sys.stderr.flush()
    os._exit(EXIT_STALLED)


class Watchdog:
    """Watches the thread that enters it.

    Args:
        seconds: without a beat for so long, the stacks of this process are written; after as long again, the run ends.
            0: nothing is watched.
        rank: of this process.
        directory: receives `rank-NNNNN.txt` when the rank stalls.
        end: ends the run; gets the message.
    """

    def __init__(
        self, seconds: float, rank: int, directory: str | Path, end: Callable[[str], None] = end_process
    ) -> None:
        self._seconds, self._rank, self._directory, self._end = seconds, rank, Path(directory), end
        self._lock = threading.Lock()
        self._doing, self._since = "starting", time.monotonic()
        self._reported = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, doing: str | None = None) -> None:
        """The rank makes progress; `doing` says what it turns to, None: it goes on with the same."""
        with self._lock:
            self._since = time.monotonic()
            self._reported = False
            if doing is not None:
                self._doing = doing

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="hcx-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 10)):
            with self._lock:
                silent, doing, reported = time.monotonic() - self._since, self._doing, self._reported
                self._reported = reported or silent > self._seconds
            if silent > 2 * self._seconds:
                self._end(self._last_words(silent, doing))
                return
            if silent > self._seconds and not reported:
                self._report(silent, doing)

    def _report(self, silent: float, doing: str) -> None:
        head = (
            f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()}) has made no progress for "
            f"{silent:.0f} s; it was {doing}"
        )
        log.error("%s; the stacks of its threads follow, and are in %s", head, self._file)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with open(self._file, "w", encoding="utf-8") as file:
                file.write(head + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.error("the report cannot be written: %s", error)

    @property
    def _file(self) -> Path:
        return self._directory / f"rank-{self._rank:05d}.txt"

    def _last_words(self, silent: float, doing: str) -> str:
        heads = []
        for path in sorted(self._directory.glob("rank-*.txt")):
            try:
                if time.time() - path.stat().st_mtime > 3 * self._seconds:
                    continue  # of an earlier stall
                with open(path, encoding="utf-8") as file:
                    heads.append(file.readline().strip())
            except OSError:
                continue
        known = "".join(f"\n  {head}" for head in heads)
        return (
            f"rank {self._rank} made no progress for {silent:.0f} s while {doing} (train.watchdog_s = "
            f"{self._seconds:g}), so the run ends; stacks are in {self._directory}:{known}\n"
            "of several ranks, look at one that is not waiting in a step or a collective; run again to resume from the "
            "last good checkpoint, or raise train.watchdog_s if the step is only slow"
        )
