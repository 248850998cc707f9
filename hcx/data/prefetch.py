"""Batches prepared ahead of their use, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prepared_ahead(prepare: Callable[[int], T], start: int, stop: int, threads: int) -> Generator[tuple[int, T]]:
    """(number, `prepare(number)`) for `start` to `stop - 1`, in order.

    The number of threads (0: none) changes nothing but the waiting, if `prepare` is a function of the number alone.
    """
    if threads == 0:
        for number in range(start, stop):
            yield number, prepare(number)
        return
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="hcx-loader") as pool:
        waiting: deque[Future[T]] = deque()
        ahead = start
        for number in range(start, stop):
            while ahead < stop and len(waiting) <= 2 * threads:
                waiting.append(pool.submit(prepare, ahead))
                ahead += 1
            yield number, waiting.popleft().result()
