"""Plain data between tester and candidate: tagged JSON, one message after its length, no pickle and no code.

Runs inside the sandbox from its source text, so it imports nothing but the standard library. What is not plain data
stays with the candidate and travels as a handle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

LONGEST = 16 * 1024 * 1024
"""Bytes of the longest message: a longer answer fails the test instead of filling the tester's memory."""


class Handle:
    """An object of the candidate that is not plain data."""

    def __init__(self, number: int) -> None:
        self.number = number


def encode(value: Any, keep: Callable[[Any], Any] | None = None) -> Any:
    """A value as JSON with tags. Subclasses (Counter, namedtuple) become their base type, which compares equal.

    Args:
        value: plain data of any depth.
        keep: stores an object that is not plain data and returns what the other side is told of it, as JSON; without
            it such objects are refused.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return {"i": hex(int(value))}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return {"f": float(value).hex()}
    if isinstance(value, complex):
        return {"c": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    if isinstance(value, Handle):
        return {"h": value.number}
    for tag, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if isinstance(value, kind):
            items: Any = getattr(kind, "__iter__")(value)  # noqa: B009 (the base type's own, whatever a subclass says)
            return {tag: [encode(item, keep) for item in items]}
    if isinstance(value, dict):
        return {"d": [[encode(k, keep), encode(v, keep)] for k, v in dict.items(value)]}
    if isinstance(value, (Decimal, Fraction)):
        return {"n": [type(value).__name__, str(value)]}
    if keep is None:
        raise TypeError(f"{type(value).__name__} is not plain data")
    return {"h": keep(value)}


def decode(value: Any, find: Callable[[Any], Any]) -> Any:
    """The value of tagged JSON; `find` gives what a handle stands for. Malformed data raises."""
    if not isinstance(value, dict):
        if value is None or isinstance(value, (bool, str)):
            return value
        raise ValueError("untagged value")
    ((tag, body),) = value.items()
    if tag in "ltsz":
        kind = {"l": list, "t": tuple, "s": set, "z": frozenset}[tag]
        return kind([decode(item, find) for item in body])
    if tag == "d":
        return {decode(k, find): decode(v, find) for k, v in body}
    if tag == "i":
        return int(body, 16)
    if tag == "f":
        return float.fromhex(body)
    if tag == "c":
        return complex(*map(float.fromhex, body))
    if tag == "b":
        return bytes.fromhex(body)
    if tag == "n":
        return {"Decimal": Decimal, "Fraction": Fraction}[body[0]](body[1])
    if tag == "h":
        return find(body)
    raise ValueError(f"unknown tag {tag!r}")


def send(descriptor: int, message: Any) -> None:
    """Writes one message."""
    data = json.dumps(message).encode()
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Reads one message; `EOFError` when the other side is gone, `ValueError` when it is too long or not JSON."""
    size = int.from_bytes(_read(descriptor, 8), "big")
    if size > LONGEST:
        raise ValueError("message too long")
    return json.loads(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
