"""A real server on a free port, inside the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hcx.model.load import LoadedModel
from hcx.serve.app import Service
from hcx.serve.config import ServeConfig
from hcx.serve.server import bind, make_server


@contextmanager
def running_server(
    loaded: LoadedModel, config: ServeConfig | None = None, api_keys: Sequence[str] = ()
) -> Iterator[tuple[str, Service]]:
    """Serves a model until the block ends; yields the address and the service behind it."""
    listener = bind("127.0.0.1", 0)
    server = make_server(loaded, config or ServeConfig(model_name="tiny"), api_keys)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        if time.monotonic() > deadline or not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server.config.app.state.service  # type: ignore[union-attr]
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
