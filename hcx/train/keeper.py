"""The checkpoints of a run, and what happens when one cannot be written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from hcx.errors import CheckpointError
from hcx.obs import get_logger
from hcx.train.config import TrainerConfig
from hcx.train.saving import CheckpointSaver, SaveOutcome

log = get_logger(__name__)

Begin = Callable[[], SaveOutcome | None]
"""Takes the snapshot and starts the writing (`CheckpointSaver.begin` with its arguments)."""


class CheckpointKeeper:
    """Saves when asked, learns what became of it, and goes on or ends by `train.checkpoint_errors`.

    Args:
        config: the run's.
        saver: writes.
        event: tells the sinks.
    """

    def __init__(
        self, config: TrainerConfig, saver: CheckpointSaver, event: Callable[[int, str, Mapping[str, Any]], None]
    ) -> None:
        self._config, self._saver, self._event = config, saver, event
        self._begun = -1
        self.saved = -1
        """The step of the last good checkpoint; -1: none."""
        self._seconds = 0.0

    def resumed(self, step: int) -> None:
        """The run goes on from the checkpoint of a step."""
        self._begun = self.saved = step

    def save(self, step: int, begin: Begin) -> None:
        """Begins the checkpoint of a step if there is none; waits for the one in flight. Collective."""
        if self._begun == step:
            return
        start = time.monotonic()
        self.settle()
        self._begun = step
        self._learn(begin())
        self._seconds += time.monotonic() - start

    def advance(self) -> None:
        """When no rank is writing any more: takes the save in flight a step further. Collective."""
        if self._saver.in_flight:
            self._learn(self._saver.advance())

    def settle(self) -> None:
        """Waits for the checkpoint in flight. Collective."""
        self._learn(self._saver.finish())

    def save_for_good(self, step: int, begin: Begin) -> None:
        """The checkpoint that ends a run: it is there when this returns. Collective.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.save(step, begin)
        self.settle()
        if self.saved != step:
            good = f"of step {self.saved}" if self.saved >= 0 else "there is none"
            raise CheckpointError(
                f"{self._saver.directory}: the last checkpoint, of step {step}, cannot be written (see the warning "
                f"above); make room or mend the disk, and run again: the run resumes from its last good checkpoint "
                f"({good})"
            )

    def take_seconds(self) -> float:
        """What saving has cost the step loop since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _learn(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        if outcome.path is not None:
            self.saved = outcome.step
            log.info("checkpoint %s", outcome.path)
            return
        # It is asked for again at the next occasion, even at the same step.
        self._begun = self.saved
        good = f"step {self.saved}" if self.saved >= 0 else "none"
        message = f"the checkpoint of step {outcome.step} was not written: {outcome.problem} (last good one: {good})"
        self._event(outcome.step, "checkpoint_failed", {"problem": outcome.problem})
        if self._config.checkpoint_errors == "stop":
            raise CheckpointError(f"{message}; mend that and run again to resume (train.checkpoint_errors = stop)")
        log.warning("%s; the run goes on", message)
