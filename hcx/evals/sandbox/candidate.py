"""The candidate's side: runs the model's program and answers calls of its functions. Everything here may be hostile."""

from __future__ import annotations

import sys
from typing import Any

from hcx.evals.sandbox.wire import Handle, decode, encode, receive, send


def _truth(value: Any) -> bool | None:
    """Whether an object is true; None where it does not say."""
    try:
        return bool(value)
    except Exception:
        return None


def serve(incoming: int, outgoing: int) -> None:
    """Runs the program, then answers calls until the tester closes the channel."""
    sys.setrecursionlimit(10_000)
    objects: list[Any] = []

    def keep(value: Any) -> tuple[int, bool | None]:
        objects.append(value)
        return len(objects) - 1, _truth(value)

    names: dict[str, Any] = {"__name__": "candidate"}
    while True:
        try:
            request = receive(incoming)
        except EOFError:
            return
        try:
            if "program" in request:
                exec(compile(request["program"], "<program>", "exec"), names)
                answer = encode(None)
            else:
                function = names[request["call"]] if isinstance(request["call"], str) else objects[request["call"]]
                arguments = decode(request["args"], objects.__getitem__)
                keywords = decode(request["kwargs"], objects.__getitem__)
                answer = encode(function(*arguments, **keywords), keep)
            send(outgoing, {"value": answer})
        except BaseException as error:
            send(outgoing, {"error": type(error).__name__, "message": str(error)[:500]})


__all__ = ["Handle", "serve"]
