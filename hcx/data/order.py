"""What loaders share: batches prepared ahead, in order; and going on only where the order is the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from hcx.errors import DataError

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


def next_sample(state: Mapping[str, Any], mine: Mapping[str, Any]) -> int:
    """Where a saved loader stood.

    Args:
        state: saved.
        mine: the state of the loader that shall go on; everything but `next_sample` must agree.

    Raises:
        DataError: naming the first difference.
    """
    for key, value in mine.items():
        if key != "next_sample" and state.get(key) != value:
            raise DataError(
                f"the data order cannot go on: {key} was {state.get(key)!r}, now {value!r}; "
                "use the same data and settings, or start a new run from the model"
            )
    return int(state["next_sample"])
