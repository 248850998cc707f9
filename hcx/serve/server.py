"""Runs the application with uvicorn on a socket that is bound before the model is loaded."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import uvicorn

from hcx.errors import LaunchError
from hcx.model.load import LoadedModel
from hcx.serve.app import create_app
from hcx.serve.config import ServeConfig

SHUTDOWN_S = 10.0
"""Seconds that running calls get to finish when the server stops; then they are told that it does."""
TOLD_S = 5
"""Seconds for that message to reach them."""


class Server(uvicorn.Server):
    """uvicorn's server, which tells running calls that it stops instead of cutting them off."""

    shutdown_s: float = SHUTDOWN_S

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses new calls, lets running ones finish for a while, then ends them with an error."""
        worker = self.config.app.state.service.worker  # type: ignore[union-attr]
        worker.refuse()
        ending = asyncio.get_running_loop().call_later(self.shutdown_s, worker.end_jobs)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A listening address, taken at once: a port in use is known before a large model is read.

    Raises:
        LaunchError: the port is in use, or the address is not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise LaunchError(f"--host {host}: no such address ({error})") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Listening already refuses a second server that binds the same port.
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise LaunchError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port (0: any free one)"
        ) from None
    return listener


def make_server(loaded: LoadedModel, config: ServeConfig, api_keys: Sequence[str] = ()) -> Server:
    """A server that is ready to run on a bound socket: `server.run(sockets=[listener])`."""
    app = create_app(loaded, config, api_keys)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=config.max_connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(SHUTDOWN_S) + TOLD_S,
        lifespan="on",
    )
    return Server(settings)
