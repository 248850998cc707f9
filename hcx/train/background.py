"""Work on a thread, whose answer or problem the main thread collects."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Abandoned(Exception):
    """The work was told to stop."""


class Task:
    """Work on a thread of its own, or done at once.

    Args:
        work: what is done; `OSError` and `Abandoned` are problems, everything else is a mistake of ours.
        threaded: on a thread; else the constructor returns when the work is done.
    """

    def __init__(self, work: Callable[[], Any], threaded: bool) -> None:
        self._work = work
        self._answer: Any = None
        self._problem: str | None = None
        self._mistake: BaseException | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="hcx-checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._answer = self._work()
        except OSError as error:
            self._problem = f"{error.filename or 'writing'}: {error.strerror or error}"
        except Abandoned:
            self._problem = "abandoned"
        except BaseException as error:
            if self._thread is None:
                raise
            self._mistake = error

    @property
    def done(self) -> bool:
        """Whether `result` will not wait."""
        return self._thread is None or not self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Waits for the end, so long at most."""
        if self._thread is not None:
            self._thread.join(seconds)

    def result(self) -> tuple[Any, str | None]:
        """(answer, problem) of work that is done; raises what is a mistake of ours."""
        if self._mistake is not None:
            raise self._mistake
        return self._answer, self._problem
