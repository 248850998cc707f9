"""The worker pool: results in rank order, errors with their traceback, no test hangs, no state survives an error."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed

from hcx.dist import process_environment
from hcx.testing.workers import WorkerError, WorkerPool


@pytest.fixture(scope="module")
def own_pool() -> Iterator[WorkerPool]:
    """Not the session's: these tests break it."""
    pool = WorkerPool(timeout_s=60.0)
    yield pool
    pool.close()


def summed(value: float) -> tuple[int, int, float]:
    rank, world_size, _ = process_environment()
    total = torch.tensor(value * (rank + 1))
    torch.distributed.all_reduce(total)
    return rank, world_size, float(total)


def process_number() -> int:
    return os.getpid()


def fail_on_rank_one() -> None:
    if process_environment()[0] == 1:
        raise ValueError("told to fail")
    # The other rank waits for it, as a collective would.
    torch.distributed.barrier()


def sleep_on_rank_one() -> None:
    if process_environment()[0] == 1:
        time.sleep(60)


def exit_on_rank_one() -> None:
    if process_environment()[0] == 1:
        os._exit(3)


def test_ranks_communicate_and_answer_in_order_and_processes_stay(own_pool: WorkerPool) -> None:
    first = own_pool.run(process_number, 2)
    assert own_pool.run(summed, 2, 2.0) == [(0, 2, 6.0), (1, 2, 6.0)]
    assert own_pool.run(process_number, 2) == first
    assert os.getpid() not in first


def test_an_error_names_its_rank_and_line_and_the_next_run_starts_afresh(own_pool: WorkerPool) -> None:
    before = own_pool.run(process_number, 2)
    started = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 of 2") as caught:
        own_pool.run(fail_on_rank_one, 2)
    assert time.monotonic() - started < 20.0
    assert "ValueError: told to fail" in str(caught.value)
    assert "in fail_on_rank_one" in str(caught.value)
    assert set(own_pool.run(process_number, 2)).isdisjoint(before)


def test_a_dead_process_is_reported_with_its_exit_code(own_pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"rank 1 of 2: the process died \(exit code 3\)"):
        own_pool.run(exit_on_rank_one, 2)


def test_a_rank_that_does_not_answer_is_named_and_killed(own_pool: WorkerPool) -> None:
    own_pool.run(process_number, 2)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 within 1 s"):
        own_pool.run(sleep_on_rank_one, 2, timeout_s=1.0)
    assert time.monotonic() - started < 20.0
