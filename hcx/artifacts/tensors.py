"""Writing safetensors files in pieces.

The library's own writer takes the whole file in one call: nobody can watch its progress, end it, or learn the digest
without reading everything again. The format is a length, a JSON header and the values; reading stays the library's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hcx.artifacts.durable import Buffer, nothing, write_durably

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


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], progress: Callable[[], None] = nothing
) -> dict[str, object]:
    """Writes contiguous CPU tensors and forces them to the disk; the bytes are those of the library's `save_file`.

    Returns:
        `size_bytes` and `digest` of the file.

    Raises:
        OSError: the disk is full, the directory cannot be written, ...
    """
    ranks = list(_NAMES)
    order = sorted(tensors, key=lambda name: (ranks.index(tensors[name].dtype), name))
    header: dict[str, object] = {}
    start = 0
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[Buffer]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield tensors[name].reshape(-1).view(torch.uint8).numpy().data

    return write_durably(path, pieces(), progress)
