"""Reads GGUF files, the containers of llama.cpp: every number of a header is checked against the file before its use.

The layout is that of ggml's `docs/gguf.md`, versions 2 and 3, little-endian: magic, version, counts, key-value pairs,
descriptions of tensors, padding, data. A file may come from anybody, so a count, a length or an offset that the file
cannot hold is refused before anything of its size is allocated. Tensors are read one at a time and in pieces, never
mapped: a model larger than the memory can be walked through.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from hcx.errors import CheckpointError, MissingExtra

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"
MAX_ENTRIES = 1 << 16
"""Tensors, and key-value pairs, of one file; real ones have hundreds."""
MAX_ELEMENTS = 1 << 22
"""Elements of all arrays of the metadata together; the largest vocabularies have a million with their merges."""
MAX_METADATA_BYTES = 128 << 20
MAX_NAME_BYTES = 1 << 16
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 16
PIECE_VALUES = 1 << 22
"""Weights dequantized at once: bounds the memory beside the tensor that is being filled."""

_SCALARS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type number of a metadata value -> how `struct` reads it."""
_STRING, _ARRAY = 8, 9
_PLAIN: dict[str, tuple[str, torch.dtype]] = {
    "F32": ("<f4", torch.float32),
    "F16": ("<f2", torch.float16),
    "BF16": ("<i2", torch.bfloat16),
}


def is_gguf(path: str | Path) -> bool:
    """Whether a MODEL argument names a GGUF file rather than a directory."""
    path = Path(path)
    return path.suffix.lower() == SUFFIX and not path.is_dir()


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        name: GGUF's, such as `blk.0.attn_q.weight`.
        shape: rows first, as torch has it; the file states the reverse.
        kind: ggml's name of the type, such as `Q4_K`.
        row_bytes: stored bytes of one row (the last dimension).
        start: offset in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    row_bytes: int
    start: int

    @property
    def rows(self) -> int:
        """Rows of all dimensions but the last."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count

    @property
    def size_bytes(self) -> int:
        """Stored bytes."""
        return self.rows * self.row_bytes


class GGUFFile:
    """One file: its metadata and its tensors.

    Attributes:
        path: the file.
        metadata: key -> value; arrays of strings are lists, other arrays are numpy's.
        tensors: name -> where it lies.

    Raises:
        CheckpointError: no GGUF file, damaged, cut short, or hostile; the message says at which key or tensor.
        MissingExtra: the package gguf, which knows the types of tensors, is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: no such file")
        self._types = _gguf()
        self._file: IO[bytes] = open(self.path, "rb")  # noqa: SIM115
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._elements = 0
            self.metadata: dict[str, Any] = {}
            self.tensors: dict[str, TensorEntry] = {}
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def read(self, name: str, arrange: Callable[[Tensor], Tensor] = lambda weight: weight) -> Tensor:
        """One tensor: F32, F16 and BF16 as stored, everything else dequantized to fp32.

        Args:
            name: GGUF's.
            arrange: what becomes of the whole tensor, such as another order of rows.

        Raises:
            CheckpointError: there is none of that name, or its type cannot be dequantized.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: the file lacks {name!r}")
        entry = self.tensors[name]
        dtype = _PLAIN[entry.kind][1] if entry.kind in _PLAIN else torch.float32
        filled = torch.empty((entry.rows, entry.shape[-1]), dtype=dtype)
        step = max(1, PIECE_VALUES // entry.shape[-1])
        self._file.seek(entry.start)
        for row in range(0, entry.rows, step):
            count = min(step, entry.rows - row)
            filled[row : row + count] = self._values(entry, self._exactly(count * entry.row_bytes, name), count)
        return arrange(filled.view(entry.shape))

    def _values(self, entry: TensorEntry, data: bytes, rows: int) -> Tensor:
        if entry.kind in _PLAIN:
            stored, dtype = _PLAIN[entry.kind]
            values = torch.from_numpy(np.frombuffer(data, dtype=stored).copy())
            return values.view(dtype).view(rows, -1)
        kind = self._types.GGMLQuantizationType[entry.kind]
        packed = np.frombuffer(data, dtype=np.uint8).reshape(rows, entry.row_bytes)
        try:
            # The fields of a damaged block may be NaN or infinite; that is for whoever uses the weight to refuse.
            with np.errstate(all="ignore"):
                values = self._types.quants.dequantize(packed, kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: {entry.name} has the type {entry.kind}, which the installed package gguf cannot "
                "dequantize; a newer one may, or convert the model to another type"
            ) from None
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(rows, -1)

    def _fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}; the file is damaged or cut short, or is no GGUF file")

    def _exactly(self, count: int, where: str) -> bytes:
        left = self._size - self._file.tell()
        if count > left:
            raise self._fail(f"{where} needs {count} bytes, and {left} are left")
        data = self._file.read(count)
        if len(data) != count:
            raise self._fail(f"{where}: {len(data)} of {count} bytes could be read")
        return data

    def _number(self, form: str, where: str) -> Any:
        return struct.unpack("<" + form, self._exactly(struct.calcsize("<" + form), where))[0]

    def _string(self, where: str, limit: int = MAX_METADATA_BYTES) -> str:
        length = self._number("Q", where)
        if length > limit:
            raise self._fail(f"{where} has a string of {length} bytes, at most {limit} are allowed")
        try:
            return self._exactly(length, where).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fail(f"{where} holds text that is not UTF-8 ({error.reason} at byte {error.start})") from None

    def _read_header(self) -> None:
        if self._exactly(4, "the magic") != MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file: it does not begin with {MAGIC.decode()!r}")
        version = self._number("I", "the version")
        if version not in VERSIONS:
            order = " (a big-endian file)" if version & 0xFFFF == 0 and version else ""
            raise CheckpointError(
                f"{self.path}: GGUF version {version}{order}; this hcx reads {' and '.join(map(str, VERSIONS))}, "
                "little-endian"
            )
        num_tensors, num_pairs = self._number("Q", "the tensor count"), self._number("Q", "the key count")
        for count, least, what in ((num_pairs, 13, "keys"), (num_tensors, 32, "tensors")):
            if count > MAX_ENTRIES or count * least > self._size:
                raise self._fail(f"it states {count} {what}; its {self._size} bytes cannot hold them")
        for number in range(num_pairs):
            key = self._string(f"key {number}", MAX_NAME_BYTES)
            if key in self.metadata:
                raise self._fail(f"the key {key!r} occurs twice")
            self.metadata[key] = self._value(self._number("I", key), key)
            if self._file.tell() > MAX_METADATA_BYTES:
                raise self._fail(f"the metadata up to {key!r} exceed {MAX_METADATA_BYTES >> 20} MiB")
        stated = [self._tensor(number) for number in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._fail(f"general.alignment = {alignment!r} is no power of two up to {MAX_ALIGNMENT}")
        data = -(-self._file.tell() // alignment) * alignment
        for name, shape, number, offset in stated:
            self._place(name, shape, number, offset, alignment, data)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind != _ARRAY:
            raise self._fail(f"{key} has a value of the unknown type {kind}")
        inner, count = self._number("I", key), self._number("Q", key)
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise self._fail(f"{key} is an array of {count} elements; all arrays may have {MAX_ELEMENTS} together")
        if inner == _STRING:
            if count * 8 > self._size:
                raise self._fail(f"{key} is an array of {count} strings, which the file cannot hold")
            return [self._string(key) for _ in range(count)]
        if inner not in _SCALARS:
            raise self._fail(f"{key} is an array of the type {inner}, which is not read")
        form = np.dtype("<" + _SCALARS[inner])
        return np.frombuffer(self._exactly(count * form.itemsize, key), dtype=form)

    def _tensor(self, number: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(f"tensor {number}", MAX_NAME_BYTES)
        dims = self._number("I", name)
        if not 1 <= dims <= MAX_DIMS:
            raise self._fail(f"{name!r} has {dims} dimensions; 1 to {MAX_DIMS} are allowed")
        sizes = struct.unpack(f"<{dims}Q", self._exactly(8 * dims, name))
        if 0 in sizes:
            raise self._fail(f"{name!r} has the shape {sizes[::-1]}, which is empty")
        return name, sizes[::-1], self._number("I", name), self._number("Q", name)

    def _place(self, name: str, shape: tuple[int, ...], number: int, offset: int, alignment: int, data: int) -> None:
        if name in self.tensors:
            raise self._fail(f"the tensor {name!r} occurs twice")
        try:
            kind = self._types.GGMLQuantizationType(number)
        except ValueError:
            raise self._fail(f"{name!r} has the unknown type {number}") from None
        block, block_bytes = self._types.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self._fail(f"{name!r} has rows of {shape[-1]} values, which {kind.name} cannot cut into {block}")
        entry = TensorEntry(name, shape, kind.name, shape[-1] // block * block_bytes, data + offset)
        if offset % alignment:
            raise self._fail(f"{name!r} begins at {offset}, which is no multiple of {alignment}")
        if entry.start + entry.size_bytes > self._size:
            raise self._fail(
                f"{name!r} {shape} of {kind.name} reaches to byte {entry.start + entry.size_bytes}, the file has "
                f"{self._size}"
            )
        self.tensors[name] = entry


def open_shards(path: str | Path) -> list[GGUFFile]:
    """A file, or all files of a model that was split (`NAME-00001-of-00003.gguf`), the named one first.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    first = GGUFFile(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        return [first]
    stem, found = first.path.stem, [first]
    try:
        ending = f"-of-{count:05d}"
        number = stem.removesuffix(ending)[-5:]
        if count > MAX_ENTRIES or not stem.endswith(ending) or not number.isdigit():
            raise CheckpointError(
                f"{path}: one of {count} parts, and not named like it: the parts are found by names such as "
                "NAME-00001-of-00003.gguf"
            )
        base = stem.removesuffix(ending)[:-5]
        for part in range(1, count + 1):
            if part != int(number):
                found.append(GGUFFile(first.path.with_name(f"{base}{part:05d}{ending}{SUFFIX}")))
    except BaseException:
        close_all(found)
        raise
    return found


def close_all(files: list[GGUFFile]) -> None:
    """Closes files."""
    for file in files:
        file.close()


def merged_metadata(files: list[GGUFFile]) -> Mapping[str, Any]:
    """The metadata of all parts; the first part of a split model has nearly everything."""
    merged: dict[str, Any] = {}
    for file in files:
        for key, value in file.metadata.items():
            merged.setdefault(key, value)
    return merged


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtra("gguf", "gguf", "reading a GGUF file") from None
    return gguf
