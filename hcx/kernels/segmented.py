"""Binary-coded weights whose rows have different numbers of planes (`row_segments`), in an order (`row_order`).

Frequent words of an embedding get more planes than rare ones (Chung et al., Extremely Low Bit Transformer Quantization,
Findings of EMNLP 2020, section 3.1). In memory such a weight is an ordinary one: the planes that a row lacks have
scales of zero, which changes no value, so every kernel serves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels.format import MAX_BITS, SCALE_DTYPES, PackedWeight


@dataclass(frozen=True)
class SegmentedWeight:
    """One weight as runs of rows.

    Attributes:
        segments: the runs, in stored order; group size, scale type, inputs and presence of an offset are the same.
        row_order: int32 `[out]`, the row that stored row `i` is; None if they are in order.
    """

    segments: tuple[PackedWeight, ...]
    row_order: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.segments:
            raise KernelError("row_segments: at least one is needed")
        kinds = {(s.in_features, s.group_size, s.scales.dtype, s.offset is not None) for s in self.segments}
        if len(kinds) > 1:
            raise KernelError("row_segments differ in inputs, group size, scale type or offset; only bits may differ")
        order = self.row_order
        if order is not None and (
            order.dtype != torch.int32
            or tuple(order.shape) != (self.out_features,)
            or not torch.equal(order.long().sort().values, torch.arange(self.out_features))
        ):
            raise KernelError(f"row_order is no permutation of {self.out_features} rows in int32")

    @property
    def out_features(self) -> int:
        """Rows."""
        return sum(segment.out_features for segment in self.segments)

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.segments[0].in_features

    @property
    def bits(self) -> int:
        """Planes of the widest run."""
        return max(segment.bits for segment in self.segments)

    @property
    def code_bits(self) -> float:
        """Mean planes per weight; scales not counted."""
        return sum(segment.bits * segment.out_features for segment in self.segments) / self.out_features

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        order = 0 if self.row_order is None else 4 * self.out_features
        return order + sum(segment.size_bytes for segment in self.segments)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, with scales, offset, order and padding counted."""
        return 8 * self.size_bytes / (self.out_features * self.in_features)

    def to_packed(self) -> PackedWeight:
        """The same weight with as many planes in every row: those that a row lacks have scales of zero."""
        planes, scales = [], []
        for segment in self.segments:
            lacking = self.bits - segment.bits
            planes.append(torch.cat([segment.planes, segment.planes.new_zeros(lacking, *segment.planes.shape[1:])]))
            scales.append(torch.cat([segment.scales, segment.scales.new_zeros(lacking, *segment.scales.shape[1:])]))
        all_planes, all_scales = torch.cat(planes, 1), torch.cat(scales, 1)
        offsets = [segment.offset for segment in self.segments if segment.offset is not None]
        offset = torch.cat(offsets) if offsets else None
        if self.row_order is not None:
            where = torch.empty(self.out_features, dtype=torch.int64)
            where[self.row_order.long()] = torch.arange(self.out_features)
            all_planes, all_scales = all_planes[:, where], all_scales[:, where]
            offset = None if offset is None else offset[where]
        first = self.segments[0]
        return PackedWeight(
            all_planes.contiguous(), all_scales.contiguous(), offset, first.in_features, first.group_size
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight `[out, in]`, rows in the model's order."""
        dense = torch.cat([segment.dequantize(dtype) for segment in self.segments])
        if self.row_order is None:
            return dense
        return torch.empty_like(dense).index_copy_(0, self.row_order.long(), dense)

    def to_tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors as stored: planes and scales of the runs one after the other, and `STEM.row_order` if any."""
        tensors = {
            f"{stem}.planes": torch.cat([segment.planes.flatten() for segment in self.segments]),
            f"{stem}.scales": torch.cat([segment.scales.flatten() for segment in self.segments]),
        }
        offsets = [segment.offset for segment in self.segments if segment.offset is not None]
        if offsets:
            tensors[f"{stem}.offset"] = torch.cat(offsets)
        if self.row_order is not None:
            tensors[f"{stem}.row_order"] = self.row_order
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def describe(self) -> dict[str, Any]:
        """The module's entry in `quantization_config.modules`."""
        return {
            **self.segments[0].describe(),
            "bits": self.bits,
            "out_features": self.out_features,
            "sorted": False,
            "row_segments": [{"rows": segment.out_features, "bits": segment.bits} for segment in self.segments],
            "row_order": self.row_order is not None,
        }


def read_segmented(stem: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> SegmentedWeight:
    """Reads what `to_tensors` and `describe` wrote.

    Raises:
        KernelError: a tensor is missing, or the runs do not make up the weight.
    """
    try:
        return _read(stem, tensors, entry)
    except (KeyError, TypeError, ValueError) as error:
        raise KernelError(f"{stem}: the entry of its row_segments is damaged ({error!r})") from None
    except KernelError as error:
        text = str(error)
        raise KernelError(text if text.startswith(stem) else f"{stem}: {text}") from None


def _read(stem: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> SegmentedWeight:
    rows, columns, group = (int(entry[key]) for key in ("out_features", "in_features", "group_size"))
    runs = entry.get("row_segments") or [{"rows": rows, "bits": entry["bits"]}]
    sizes = [(int(run["rows"]), int(run["bits"])) for run in runs]
    if any(count < 1 or not 1 <= bits <= MAX_BITS for count, bits in sizes) or sum(count for count, _ in sizes) != rows:
        raise KernelError(
            f"row_segments = {runs}; rows must be positive and add up to {rows}, bits from 1 to {MAX_BITS}"
        )
    if rows < 1 or columns < 1 or group < 1:
        raise KernelError(f"{rows} x {columns} weights in groups of {group}; must be positive")
    names = [
        "planes",
        "scales",
        *(["offset"] if entry.get("offset") else []),
        *(["row_order"] if entry.get("row_order") else []),
    ]
    for name in names:
        if f"{stem}.{name}" not in tensors:
            raise KernelError(f"{stem}.{name}: missing from the weight files")
    planes, scales = tensors[f"{stem}.planes"].flatten(), tensors[f"{stem}.scales"].flatten()
    offset = tensors[f"{stem}.offset"] if entry.get("offset") else None
    row_bytes, groups = -(-columns // 8), -(-columns // group)
    total = sum(count * bits for count, bits in sizes)
    if planes.numel() != total * row_bytes or scales.numel() != total * groups:
        raise KernelError(
            f"{planes.numel()} bytes of planes and {scales.numel()} scales; the row_segments need "
            f"{total * row_bytes} and {total * groups}"
        )
    if scales.dtype not in SCALE_DTYPES:
        raise KernelError(f"scales are {scales.dtype}; allowed: {', '.join(SCALE_DTYPES.values())}")
    if offset is not None and tuple(offset.shape) != (rows, groups):
        raise KernelError(f"offset is {tuple(offset.shape)}; expected {(rows, groups)}")
    found, row, at = [], 0, 0
    for count, bits in sizes:
        here = slice(at * row_bytes, (at + count * bits) * row_bytes)
        found.append(
            PackedWeight(
                planes[here].view(bits, count, row_bytes),
                scales[at * groups : (at + count * bits) * groups].view(bits, count, groups),
                None if offset is None else offset[row : row + count],
                columns,
                group,
            )
        )
        row, at = row + count, at + count * bits
    return SegmentedWeight(tuple(found), tensors[f"{stem}.row_order"] if entry.get("row_order") else None)


def split_rows(weight: Tensor, order: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of a weight in an order, cut into runs of the given sizes."""
    if sum(sizes) != weight.shape[0] or order.numel() != weight.shape[0]:
        raise KernelError(
            f"runs of {sum(sizes)} rows and an order of {order.numel()}; the weight has {weight.shape[0]}"
        )
    return list(weight[order.long()].split(list(sizes)))
