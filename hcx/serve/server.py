"""Runs the application with uvicorn on a socket that is bound before the model is loaded."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import uvicorn

from hcx.errors import LaunchError
from hcx.model.load import LoadedModel
from hcx.serve.app import create_app
from hcx.serve.config import ServeConfig

SHUTDOWN_S = 10
"""Seconds that open connections get when the server stops."""


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


def make_server(loaded: LoadedModel, config: ServeConfig, api_keys: Sequence[str] = ()) -> uvicorn.Server:
    """A server that is ready to run on a bound socket: `server.run(sockets=[listener])`."""
    app = create_app(loaded, config, api_keys)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=config.max_connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=SHUTDOWN_S,
        lifespan="on",
    )
    return uvicorn.Server(settings)
