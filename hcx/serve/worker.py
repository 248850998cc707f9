"""The thread that owns the model, and the jobs that the event loop hands to it."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from hcx.generate import Generator, Piece, Request
from hcx.obs import get_logger
from hcx.serve.errors import ApiError
from hcx.serve.metrics import ServeMetrics

log = get_logger(__name__)


class Job:
    """The requests of one call, and their pieces as they come. Belongs to the event loop.

    Attributes:
        requests: one per choice.
    """

    def __init__(self, requests: Sequence[Request], release: Callable[[Job], None]) -> None:
        self.requests = tuple(requests)
        self.open = len(self.requests)
        self._release = release
        self._queue: asyncio.Queue[tuple[int, Piece] | ApiError] = asyncio.Queue()

    def put(self, item: tuple[int, Piece] | ApiError) -> None:
        """A piece of a choice, or the failure of the whole job."""
        self._queue.put_nowait(item)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces with the number of their choice, until every choice has finished.

        Raises:
            ApiError: the model failed or the server is stopping.
        """
        while self.open:
            item = await self._queue.get()
            if isinstance(item, ApiError):
                raise item
            if item[1].finish_reason is not None:
                self.open -= 1
            yield item

    def close(self) -> None:
        """Frees the rows of whatever has not finished. May be called twice."""
        self._release(self)


@dataclass(frozen=True)
class _Entry:
    job: Job
    index: int


class ModelWorker:
    """Runs a generator's scheduler on a thread of its own.

    Args:
        generator: the model; nobody else may use it while the worker runs.
        max_queue: choices that may wait.
        metrics: where counts and times go.
    """

    def __init__(self, generator: Generator, max_queue: int, metrics: ServeMetrics) -> None:
        self.generator = generator
        self.capacity = generator.scheduler.cache.rows + max_queue
        self.metrics = metrics
        self.pending = 0
        # Read when somebody asks, so that they are right also while the worker rests.
        metrics.running.set_function(lambda: len(generator.scheduler.rows))
        metrics.waiting.set_function(lambda: self.pending - len(generator.scheduler.rows))
        self._jobs: set[Job] = set()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._entries: dict[Request, _Entry] = {}
        self._seen: dict[Request, float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def running(self) -> bool:
        """Whether the thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread; pieces are delivered on the loop."""
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="hcx-model", daemon=True)
        self._thread.start()

    def refuse(self) -> None:
        """Takes no more jobs; running ones go on."""
        self._stopping = True

    def end_jobs(self) -> None:
        """Tells every open job that the server stops. On the event loop's thread."""
        for job in self._jobs:
            job.put(ApiError(503, "the server is stopping", code="shutting_down"))

    def stop(self) -> None:
        """Ends the thread after its current step; open jobs fail with status 503. On the event loop's thread."""
        self.refuse()
        self._inbox.put(None)
        self.end_jobs()
        if self._thread is not None:
            self._thread.join()

    # On the event loop's thread.

    def submit(self, requests: Sequence[Request]) -> Job:
        """Queues the requests of one call.

        Raises:
            ApiError: 429 when too many are waiting, 503 when the server is stopping.
        """
        if self._stopping or not self.running:
            raise ApiError(503, "the server is stopping", code="shutting_down")
        if self.pending + len(requests) > self.capacity:
            raise ApiError(
                429,
                f"{self.pending} choices are waiting or running, and this call has {len(requests)}; "
                f"at most {self.capacity}; try again later",
                code="queue_full",
            )
        job = Job(requests, self._close)
        self._jobs.add(job)
        self.pending += len(requests)
        self._inbox.put(lambda: self._admit(job))
        return job

    def _close(self, job: Job) -> None:
        if job not in self._jobs:
            return
        self._jobs.discard(job)
        self.pending -= len(job.requests)
        if job.open:
            self._inbox.put(lambda: self._cancel(job))

    # On the worker's thread.

    def _admit(self, job: Job) -> None:
        for index, request in enumerate(job.requests):
            self._entries[request] = _Entry(job, index)
            self.generator.scheduler.submit(request)

    def _cancel(self, job: Job) -> None:
        for request in job.requests:
            if self._entries.pop(request, None) is not None:
                self._seen.pop(request, None)
                self.generator.scheduler.cancel(request)
                self.metrics.cancelled.inc()

    def _run(self) -> None:
        scheduler = self.generator.scheduler
        while self._obey(wait=not scheduler.has_work):
            try:
                pieces = scheduler.step()
            except Exception:
                # A failure of the model must not end the server: those in flight are told, others may try.
                log.exception("a generation step failed; %d requests are dropped", len(self._entries))
                scheduler.clear()
                self._fail(ApiError(500, "the model failed while generating; see the server's log", code="model_error"))
                continue
            self._deliver(pieces)

    def _obey(self, wait: bool) -> bool:
        """Carries out what the event loop asked for; False when the worker should end."""
        try:
            while True:
                command = self._inbox.get(block=wait)
                if command is None:
                    return False
                try:
                    command()
                except Exception:
                    log.exception("a request could not be queued")
                    self.generator.scheduler.clear()
                    self._fail(ApiError(500, "a request could not be queued; see the server's log"))
                wait = not self.generator.scheduler.has_work
        except queue.Empty:
            return True

    def _deliver(self, pieces: list[tuple[Request, Piece]]) -> None:
        now = time.monotonic()
        batch: dict[Job, list[tuple[int, Piece]]] = defaultdict(list)
        for request, piece in pieces:
            entry = self._entries.get(request)
            if entry is None:
                continue
            batch[entry.job].append((entry.index, piece))
            if piece.token_ids:
                before = self._seen.get(request)
                if before is None:
                    self.metrics.ttft_ms.observe((now - request.arrived) * 1e3)
                else:
                    self.metrics.token_ms.observe((now - before) * 1e3)
                self._seen[request] = now
                self.metrics.completion_tokens.inc(len(piece.token_ids))
            if piece.finish_reason is not None:
                del self._entries[request]
                self._seen.pop(request, None)
        for job, items in batch.items():
            self._post(job, items)

    def _fail(self, error: ApiError) -> None:
        jobs = {entry.job for entry in self._entries.values()}
        self._entries.clear()
        self._seen.clear()
        for job in jobs:
            self._post(job, [error])

    def _post(self, job: Job, items: Sequence[tuple[int, Piece] | ApiError]) -> None:
        def put() -> None:
            for item in items:
                job.put(item)

        if self._loop is None:
            raise RuntimeError("the worker has not been started")
        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:
            # The loop has closed: the server is going away and nobody listens.
            self._stopping = True
