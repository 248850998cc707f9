"""Files that are whole and on the disk before anything names them: written, synchronised, renamed into place.

A rename without `fsync` may survive a power cut that the data did not; so files are synchronised before the rename, and
directories after it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

PIECE_BYTES = 16 << 20
"""Bytes per write: between two of them a caller may count progress or give up."""

Buffer = bytes | memoryview

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def nothing() -> None:
    """The progress hook of callers that have none."""


def write_durably(path: Path, pieces: Iterable[Buffer], progress: Callable[[], None] = nothing) -> dict[str, object]:
    """Writes a file and forces it to the disk.

    Args:
        path: replaced if it exists.
        pieces: the bytes, in order.
        progress: called after every write; what it raises ends the writing.

    Returns:
        `size_bytes` and `digest`, as manifests state them; the file is not read for it.

    Raises:
        OSError: the disk is full, the directory cannot be written, ...
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for buffer in pieces:
            view = memoryview(buffer).cast("B")
            for start in range(0, len(view), PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                written = 0
                while written < len(piece):
                    # A write may be partial: at a quota, or beyond 2 GiB.
                    written += os.write(descriptor, piece[written:])
                digest.update(piece)
                size += len(piece)
                progress()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size_bytes": size, "digest": "sha256:" + digest.hexdigest()}


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, [data])
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Forces the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(source: Path, destination: Path) -> None:
    """Renames a finished directory into place; what was there is exchanged with it in one step, then removed."""
    sync_directory(source)
    if destination.exists():
        if not _exchange(source, destination):
            old = destination.with_name(f".{destination.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(destination, old)
            os.replace(source, destination)
            source = old
        sync_directory(destination.parent)
        shutil.rmtree(source, ignore_errors=True)
        return
    os.replace(source, destination)
    sync_directory(destination.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names at once, where kernel, library and file system can (Linux: renameat2)."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
