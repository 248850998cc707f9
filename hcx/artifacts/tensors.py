"""Writing safetensors files in pieces.

The library's own writer takes the whole file in one call: nobody can watch its progress, end it, or learn the digest
without reading everything again. The format is a length, a JSON header and the values; reading stays the library's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcx.artifacts.durable import PIECE_BYTES, Buffer, nothing, write_atomically, write_durably

_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
"""In the library's order: wide types first, so that every value is aligned."""


def join_safetensors(
    directory: Path, parts: Sequence[Path], stem: str, max_bytes: int, progress: Callable[[], None] = nothing
) -> int:
    """Joins files into `STEM.safetensors`, or into numbered ones with an index, copying bytes and never a whole file.

    Args:
        directory: where the result goes.
        parts: safetensors files with different names of tensors; a part is never cut.
        stem: of the new files.
        max_bytes: of the values in a file, unless one part alone has more.
        progress: called after every write.

    Returns:
        The number of bytes of all tensors.

    Raises:
        OSError: the disk is full, a part cannot be read, ...
    """
    headers = [_header(part) for part in parts]
    sizes = [sum(tensor.size for tensor in header) for header in headers]
    groups: list[list[_Stored]] = []
    filled = 0
    for header, size in zip(headers, sizes, strict=True):
        if not groups or filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1] += header
        filled += size
    weight_map: dict[str, str] = {}
    for count, group in enumerate(groups, 1):
        numbered = f"{stem}-{count:05d}-of-{len(groups):05d}.safetensors"
        name = numbered if len(groups) > 1 else f"{stem}.safetensors"
        # Wide types first, as in the library's own files: every value stays aligned.
        _write_copies(directory / name, sorted(group, key=lambda tensor: -tensor.width), progress)
        weight_map.update((tensor.name, name) for tensor in group)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_atomically(directory / f"{stem}.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())
    return sum(sizes)


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file that this module wrote."""

    name: str
    path: Path
    dtype: str
    shape: list[int]
    start: int
    size: int

    @property
    def width(self) -> int:
        return next(torch.empty(0, dtype=dtype).element_size() for dtype, name in _NAMES.items() if name == self.dtype)


def _header(path: Path) -> list[_Stored]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(length))
    return [
        _Stored(name, path, entry["dtype"], entry["shape"], 8 + length + first, last - first)
        for name, entry in entries.items()
        for first, last in [entry["data_offsets"]]
    ]


def _write_copies(path: Path, tensors: Sequence[_Stored], progress: Callable[[], None]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        offsets = [start, start + tensor.size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        start += tensor.size

    def pieces() -> Iterator[Buffer]:
        yield _encoded(header)
        for tensor in tensors:
            with open(tensor.path, "rb") as file:
                file.seek(tensor.start)
                for done in range(0, tensor.size, PIECE_BYTES):
                    yield file.read(min(PIECE_BYTES, tensor.size - done))

    write_durably(path, pieces(), progress)


def _encoded(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    progress: Callable[[], None] = nothing,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """Writes contiguous CPU tensors and forces them to the disk; the bytes are those of the library's `save_file`.

    The library makes files that only their owner may read; these have the permissions of any new file, so that a model
    can be served by another account of its group.

    Args:
        path: of the file.
        tensors: by name.
        progress: called after every write.
        metadata: the header's `__metadata__`.

    Returns:
        `size_bytes` and `digest` of the file.

    Raises:
        OSError: the disk is full, the directory cannot be written, ...
    """
    ranks = list(_NAMES)
    order = sorted(tensors, key=lambda name: (ranks.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop

    def pieces() -> Iterator[Buffer]:
        yield _encoded(header)
        for name in order:
            yield tensors[name].reshape(-1).view(torch.uint8).numpy().data

    return write_durably(path, pieces(), progress)
