"""A rank that hangs is named with its stack, and ends; one that works, however long, is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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


def test_long_saving_and_long_validation_are_no_stalls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def slow(descriptor: int, data: memoryview) -> int:
        time.sleep(0.02)
        return write(descriptor, data)

    monkeypatch.setattr("hcx.artifacts.durable.os.write", slow)
    monkeypatch.setattr("hcx.artifacts.durable.PIECE_BYTES", 50_000)
    monkeypatch.setattr("hcx.train.validation.ROUNDS_PER_CALL", 1)
    for asynchronous in (False, True):
        trainer = small_trainer(tmp_path / f"{asynchronous}", steps=2, checkpoint_async=asynchronous, watchdog_s=0.4)
        messages: list[str] = []
        trainer._watchdog._end = messages.append
        score = trainer.engine.score
        (held_out,) = trainer.validation
        object.__setattr__(held_out, "micro_batches", held_out.micro_batches * 12)

        def late(batches, fn, score=score):  # type: ignore[no-untyped-def]
            time.sleep(0.05)
            return score(batches, fn)

        monkeypatch.setattr(trainer.engine, "score", late)
        start = time.monotonic()
        assert trainer.run().finished
        # Long enough to have been taken for a stall, had nobody given a sign.
        assert time.monotonic() - start > 2 * 0.4
        assert not messages
        assert not (tmp_path / f"{asynchronous}" / "stalls").exists()


STALLING = """
import sys, time
from hcx.testing.runs import FaultyNextToken, small_trainer
from hcx.dist import init_process_group, process_environment

class Stuck(FaultyNextToken):
    def __call__(self, output, micro_batch):
        if process_environment()[0] == 1 and 10 in micro_batch.sample_ids:
            hang_here()
        return super().__call__(output, micro_batch)

def hang_here():
    time.sleep(600)

if __name__ == "__main__":
    init_process_group()
    small_trainer(sys.argv[1], steps=6, objective=Stuck({}), validate=False, watchdog_s=1.0, micro_batch=1).run()
"""


def test_a_hanging_rank_ends_the_whole_run_and_is_the_one_not_in_a_collective(tmp_path: Path) -> None:
    (tmp_path / "stalling.py").write_text(STALLING, encoding="utf-8")
    from hcx.dist.spawn import free_port

    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["OMP_NUM_THREADS"] = "1"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "stalling.py"), str(tmp_path / "run")],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=60)[1] for process in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    assert ranks[1].returncode == 75
    # The other rank ends by its own watchdog, or because its peer is gone.
    assert ranks[0].returncode not in (None, 0)
    assert "rank 1 made no progress" in told[1]
    assert "in step 3" in told[1]
    report = (tmp_path / "run" / "stalls" / "rank-00001.txt").read_text(encoding="utf-8")
    assert "hang_here" in report
    waiting = tmp_path / "run" / "stalls" / "rank-00000.txt"
    assert "hang_here" not in waiting.read_text(encoding="utf-8")
