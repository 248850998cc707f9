"""How an answer reaches its client: whole or as a stream, within its time, and only while someone listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from hcx.serve.answers import DONE, event
from hcx.serve.errors import ApiError

CLIENT_CLOSED = 499
"""nginx's status for a client that went away; nobody receives it, it shows in the metrics."""


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _while_listening(work: Coroutine[Any, Any, Any], receive: Receive, timeout_s: float) -> bool:
    """Runs work until it ends or the client goes away; False in the second case.

    Raises:
        ApiError: 503 when the time is over.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_until_disconnect(receive))
    try:
        done, _ = await asyncio.wait({task, watch}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            # Its own clean-up must have run before the caller frees what it used.
            await asyncio.gather(task, return_exceptions=True)
    if task in done:
        task.result()
        return True
    if watch in done:
        return False
    raise ApiError(503, f"the request took longer than {timeout_s:g} s", code="timeout")


async def deliver_whole(
    request: Request, answer: Callable[[], Awaitable[dict[str, Any]]], close: Callable[[], None], timeout_s: float
) -> Response:
    """The whole answer as JSON; frees the job in every case."""
    value: dict[str, Any] = {}

    async def work() -> None:
        value.update(await answer())

    try:
        listening = await _while_listening(work(), request.receive, timeout_s)
    finally:
        close()
    return JSONResponse(value) if listening else Response(status_code=CLIENT_CLOSED)


class EventStream(Response):
    """Server-sent events; frees the job when they end, the client goes away, or the time is over.

    Args:
        events: the encoded events.
        close: frees the job.
        timeout_s: for the whole stream, also when the client reads slowly.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None], timeout_s: float) -> None:
        super().__init__()
        # A Response states the length of its empty body; a stream has none.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self.headers["Cache-Control"] = "no-cache"
        self._events, self._close, self._timeout_s = events, close, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode("utf-8"), "more_body": more})

        async def work() -> None:
            async for text in self._events:
                await put(text)
            await put("", more=False)

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await _while_listening(work(), receive, self._timeout_s)
            except ApiError as error:
                # The status has gone out already: the error is an event.
                await put(event(error.body()) + DONE)
                await put("", more=False)
        finally:
            self._close()
