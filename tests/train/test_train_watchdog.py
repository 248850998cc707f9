"""A process that hangs is named with its stack, and ends; one that works, however long, is left alone.

Of several ranks, see `test_train_endings.py`.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from hcx.testing.runs import small_trainer
from hcx.train.watchdog import Watchdog

PERIOD_S = 0.3


def ended(directory: Path, seconds: float = PERIOD_S) -> tuple[Watchdog, list[str], threading.Event]:
    """A watchdog whose end is noted instead of carried out."""
    messages: list[str] = []
    over = threading.Event()

    def end(message: str) -> None:
        messages.append(message)
        over.set()

    return Watchdog(seconds, 3, directory, end), messages, over


def stuck_in_the_data(over: threading.Event) -> bool:
    """A name to look for in the stack."""
    return over.wait(20)


def test_a_stall_is_reported_with_rank_activity_and_stack_and_then_ends(tmp_path: Path) -> None:
    watchdog, messages, over = ended(tmp_path)
    with watchdog:
        watchdog.beat("reading the data of step 7")
        assert stuck_in_the_data(over)
    report = (tmp_path / "rank-00003.txt").read_text(encoding="utf-8")
    assert report.startswith("rank 3 (process ")
    assert "it was reading the data of step 7" in report
    assert "stuck_in_the_data" in report
    (message,) = messages
    assert "rank 3 made no progress" in message
    assert "while reading the data of step 7" in message
    assert "train.watchdog_s = 0.3" in message


def test_beats_keep_it_quiet_and_zero_turns_it_off(tmp_path: Path) -> None:
    watchdog, messages, over = ended(tmp_path)
    with watchdog:
        for _ in range(40):
            watchdog.beat()
            time.sleep(PERIOD_S / 10)
    off, others, _ = ended(tmp_path, seconds=0)
    with off:
        time.sleep(3 * PERIOD_S)
    assert not over.is_set()
    assert not messages
    assert not others
    assert list(tmp_path.iterdir()) == []


class Signs:
    """Counts a watchdog's beats, and the work done since the last one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changed = threading.Condition()
        self.beats = self.work = self.silent = self.longest = 0
        beat = Watchdog.beat

        def counted(watchdog: Watchdog, doing: str | None = None) -> None:
            with self.changed:
                self.beats, self.silent = self.beats + 1, 0
                self.changed.notify_all()
            beat(watchdog, doing)

        monkeypatch.setattr(Watchdog, "beat", counted)

    def worked(self) -> None:
        """A piece of work is done."""
        with self.changed:
            self.work, self.silent = self.work + 1, self.silent + 1
            self.longest = max(self.longest, self.silent)

    def wait(self, beats: int) -> None:
        """Returns once there have been more beats than that."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.beats > beats, timeout=20)


MOST_SILENT = 4
"""Pieces written or forwards made between two signs of life: a long save or validation is never silent for long."""


def test_a_long_validation_and_a_save_that_is_waited_for_give_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Work is counted and not timed: how long a piece takes is the machine's affair.
    signs, write = Signs(monkeypatch), os.write

    def counted_write(descriptor: int, data: memoryview) -> int:
        signs.worked()
        return write(descriptor, data)

    monkeypatch.setattr("hcx.artifacts.durable.os.write", counted_write)
    monkeypatch.setattr("hcx.artifacts.durable.PIECE_BYTES", 50_000)
    monkeypatch.setattr("hcx.train.validation.ROUNDS_PER_CALL", 1)
    trainer = small_trainer(tmp_path, steps=2, checkpoint_async=False, watchdog_s=600.0)
    (held_out,) = trainer.validation
    object.__setattr__(held_out, "micro_batches", held_out.micro_batches * 12)
    score = trainer.engine.score

    def counted_score(batches, fn):  # type: ignore[no-untyped-def]
        signs.worked()
        return score(batches, fn)

    monkeypatch.setattr(trainer.engine, "score", counted_score)
    assert trainer.run().finished
    assert signs.work > 10 * MOST_SILENT
    assert signs.longest <= MOST_SILENT


def test_waiting_for_a_writing_thread_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signs, write, seen = Signs(monkeypatch), os.write, [0]

    def patient_write(descriptor: int, data: memoryview) -> int:
        if threading.current_thread() is not threading.main_thread():
            # Some pieces on, it waits for a sign that came after the last one it saw.
            signs.worked()
            if signs.work % (MOST_SILENT + 1) == 0:
                signs.wait(seen[0])
                seen[0] = signs.beats
        return write(descriptor, data)

    monkeypatch.setattr("hcx.artifacts.durable.os.write", patient_write)
    monkeypatch.setattr("hcx.artifacts.durable.PIECE_BYTES", 50_000)
    monkeypatch.setattr("hcx.train.saving.POLL_S", 0.002)
    trainer = small_trainer(tmp_path, steps=2, checkpoint_async=True, watchdog_s=600.0)
    assert trainer.run().finished
    assert signs.work > 10 * MOST_SILENT
