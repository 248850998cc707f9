"""A server of our own in another process, and its client, for verbs that end in serving."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hcx.dist.spawn import free_port
from hcx.errors import LaunchError


@contextmanager
def running_server(directory: Path, log_file: Path) -> Iterator[int]:
    """Starts `hcx serve` on a model directory and gives its port; ends it afterwards.

    Raises:
        LaunchError: it did not start; the end of its log is told.
    """
    port = free_port()
    command = [sys.executable, "-m", "hcx.cli.main", "serve", str(directory), "--port", str(port)]
    with open(log_file, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    get(port, "/health")
                    break
                except (OSError, http.client.HTTPException):
                    if process.poll() is not None or time.monotonic() > deadline:
                        tail = log_file.read_text(errors="replace")[-800:]
                        raise LaunchError(f"the server did not start; its log {log_file} ends with:\n{tail}") from None
                    time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def request(port: int, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
    """An answer of the server, not read yet.

    Raises:
        LaunchError: it is no success.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    data = None if body is None else json.dumps(body).encode()
    connection.request(method, path, body=data, headers={"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise LaunchError(f"{path} answered {response.status}: {response.read(500).decode(errors='replace')}")
    return response


def get(port: int, path: str) -> dict[str, Any]:
    """The JSON that a path answers."""
    found: dict[str, Any] = json.loads(request(port, "GET", path, None).read())
    return found


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON that a path answers to a body."""
    found: dict[str, Any] = json.loads(request(port, "POST", path, body).read())
    return found
