"""What every call passes before its endpoint: host, key, and the size of the body."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from hcx.serve.config import ServeConfig, is_loopback
from hcx.serve.errors import ApiError

OPEN_PATHS = ("/", "/health")
"""Need no key: they tell nothing about the model's use."""


class Guard:
    """ASGI middleware in front of all endpoints.

    With keys, every path but `OPEN_PATHS` needs one. Without keys the server is local, and the Host header must be a
    local name: otherwise a web page could reach it under a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._refusal(scope["path"], Headers(scope=scope))
        if error is not None:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if not self.keys:
            host = _without_port(headers.get("host", ""))
            if not is_loopback(host):
                return ApiError(403, f"Host {host!r} is not a name of this machine; use 127.0.0.1", code="wrong_host")
            return None
        if path in OPEN_PATHS:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Every key is compared, in constant time: the time taken says nothing about which one was near.
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self.keys]
        if kind.lower() != "bearer" or not any(matches):
            return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return None


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


async def read_body(request: Request, config: ServeConfig) -> bytes:
    """The body of a JSON call, within its size and time.

    Raises:
        ApiError: 413 too large, 415 not JSON, 408 too slow.
    """
    # A web page of another origin may only send "simple" types without asking first; JSON it may not.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type {kind or '(none)'!r}: send application/json")
    too_large = ApiError(413, f"the body is larger than {config.max_body_bytes} bytes", code="body_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > config.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > config.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {config.body_timeout_s:g} s") from None
    return bytes(body)
