"""The canonical packed format of a binary-coded weight (kernels/FORMAT.md specifies it in words).

`W[r, k] ~ sum_i scales[i, r, k // g] * (2 * plane_i[r, k] - 1) + offset[r, k // g]`

The format with an offset is LUT-GEMM's (Park et al. 2024, section 3): it contains every uniform quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hcx.errors import KernelError

VERSION = 1
MAX_BITS = 8
SCALE_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
UNSUPPORTED = ("in_order", "activation_ranges")
"""Optional keys of the format that this version refuses by name."""


@dataclass(frozen=True)
class PackedWeight:
    """One weight `[out, in]` as bit planes and scales.

    Attributes:
        planes: uint8 `[q, out, ceil(in / 8)]`; input `8 j + k` is bit `k` of byte `j`; 1 means +1; pad bits are 0.
            Coarsest plane first.
        scales: `[q, out, ceil(in / g)]` fp16, bf16 or fp32; the last group may be short; may be negative.
        offset: fp32 `[out, ceil(in / g)]`, or None.
        in_features: inputs, without padding.
        group_size: inputs per scale.
        sorted: whether scales fall in magnitude from plane to plane in every group.
        narrow: number of planes -> scales and offset with which so many first planes are a narrower weight of its own.
    """

    planes: Tensor
    scales: Tensor
    offset: Tensor | None
    in_features: int
    group_size: int
    sorted: bool = False
    narrow: Mapping[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.planes.dtype != torch.uint8 or self.planes.dim() != 3:
            raise KernelError(
                f"planes are {self.planes.dtype} {tuple(self.planes.shape)}; expected uint8 [q, out, bytes]"
            )
        if not 1 <= self.bits <= MAX_BITS:
            raise KernelError(f"{self.bits} planes; 1 to {MAX_BITS} are allowed")
        if self.group_size < 1 or self.in_features < 1:
            raise KernelError(f"group_size = {self.group_size}, in_features = {self.in_features}; must be positive")
        columns, groups = -(-self.in_features // 8), self.num_groups
        if self.planes.shape[2] != columns:
            raise KernelError(
                f"planes have {self.planes.shape[2]} bytes per row; {self.in_features} inputs need {columns}"
            )
        if tuple(self.scales.shape) != (self.bits, self.out_features, groups):
            raise KernelError(
                f"scales are {tuple(self.scales.shape)}; expected {(self.bits, self.out_features, groups)}"
            )
        if self.scales.dtype not in SCALE_DTYPES:
            raise KernelError(f"scales are {self.scales.dtype}; allowed: {', '.join(SCALE_DTYPES.values())}")
        if self.offset is not None and (
            self.offset.dtype != torch.float32 or tuple(self.offset.shape) != (self.out_features, groups)
        ):
            raise KernelError(
                f"offset is {self.offset.dtype} {tuple(self.offset.shape)}; "
                f"expected fp32 {(self.out_features, groups)} (rounded offsets lose exactness)"
            )
        if self.narrow and not self.sorted:
            raise KernelError("a weight of several widths has unsorted planes; the last ones must be the smallest")
        for width, (scales, offset) in self.narrow.items():
            if not 1 <= width < self.bits:
                raise KernelError(f"a narrower width of {width} planes in a weight of {self.bits}")
            # The checks of a weight of that width are the checks above.
            replace(self, planes=self.planes[:width], scales=scales, offset=offset, narrow={})

    @property
    def widths(self) -> tuple[int, ...]:
        """Every number of planes that it can be served with, rising."""
        return (*sorted(self.narrow), self.bits)

    def at(self, bits: int) -> PackedWeight:
        """The weight of the first `bits` planes, with their own scales and offset.

        Raises:
            KernelError: it has none of that width.
        """
        if bits == self.bits:
            return replace(self, narrow={})
        if bits not in self.narrow:
            raise KernelError(f"no width of {bits} planes; this weight has {', '.join(map(str, self.widths))}")
        scales, offset = self.narrow[bits]
        return replace(self, planes=self.planes[:bits].contiguous(), scales=scales, offset=offset, narrow={})

    @property
    def bits(self) -> int:
        """Planes."""
        return self.planes.shape[0]

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.planes.shape[1]

    @property
    def num_groups(self) -> int:
        """Groups along the inputs; the last may be short."""
        return -(-self.in_features // self.group_size)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of planes, scales and offsets, those of narrower widths included."""
        tensors = self.to_tensors("").values()
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, with scales, offset and padding counted."""
        return 8 * self.size_bytes / (self.out_features * self.in_features)

    def signs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The planes as +1 and -1, `[q, out, in]`."""
        table = _sign_table(dtype, self.planes.device)
        return table[self.planes.int()].flatten(2)[:, :, : self.in_features]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight `[out, in]`, summed in fp32 from the coarsest plane on, then cast."""
        pad = self.num_groups * self.group_size - self.in_features
        signs = torch.nn.functional.pad(self.signs(), (0, pad)) if pad else self.signs()
        grouped = signs.unflatten(2, (self.num_groups, self.group_size))
        total = grouped[0] * self.scales[0].float()[:, :, None]
        for plane in range(1, self.bits):
            total.addcmul_(grouped[plane], self.scales[plane].float()[:, :, None])
        if self.offset is not None:
            total += self.offset[:, :, None]
        return total.flatten(1)[:, : self.in_features].to(dtype)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on a device."""
        offset = None if self.offset is None else self.offset.to(device)
        narrow = {
            width: (scales.to(device), None if own is None else own.to(device))
            for width, (scales, own) in self.narrow.items()
        }
        return replace(self, planes=self.planes.to(device), scales=self.scales.to(device), offset=offset, narrow=narrow)

    def to_packed(self) -> PackedWeight:
        """Itself; what other forms on disk become at load."""
        return self

    def to_tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors as stored: `STEM.planes`, `STEM.scales`, `STEM.offset` if any; `_W` after narrower widths'."""
        tensors = {f"{stem}.planes": self.planes}
        for suffix, scales, offset in [("", self.scales, self.offset)] + [
            (f"_{width}", *self.narrow[width]) for width in sorted(self.narrow)
        ]:
            tensors[f"{stem}.scales{suffix}"] = scales
            if offset is not None:
                tensors[f"{stem}.offset{suffix}"] = offset
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def describe(self) -> dict[str, Any]:
        """The module's entry in `quantization_config.modules`."""
        entry: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "scale_dtype": SCALE_DTYPES[self.scales.dtype],
            "offset": self.offset is not None,
            "sorted": self.sorted,
        }
        if self.narrow:
            entry["widths"] = list(self.widths)
        return entry

    @staticmethod
    def tensor_names(stem: str, entry: Mapping[str, Any]) -> list[str]:
        """The names under which `to_tensors` stored a weight with this entry."""
        suffixes = ["", *(f"_{width}" for width in list(entry.get("widths") or [])[:-1])]
        kinds = ["scales", "offset"] if entry.get("offset") else ["scales"]
        return [f"{stem}.planes", *(f"{stem}.{kind}{suffix}" for suffix in suffixes for kind in kinds)]

    @classmethod
    def from_tensors(cls, stem: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> PackedWeight:
        """Reads what `to_tensors` and `describe` wrote.

        Raises:
            KernelError: a tensor is missing, shapes disagree, or the entry uses an option this version lacks.
        """
        for key in UNSUPPORTED:
            if entry.get(key):
                raise KernelError(f"{stem}: the option {key!r} is not supported by this version of hcx")
        # Other forms on disk become this one at load, so that every kernel serves them.
        if entry.get("mask") or entry.get("encoding"):
            from hcx.kernels.masked import read_masked

            return read_masked(stem, tensors, entry).to_packed()
        if entry.get("row_segments") or entry.get("row_order"):
            from hcx.kernels.segmented import read_segmented

            return read_segmented(stem, tensors, entry).to_packed()
        for name in cls.tensor_names(stem, entry):
            if name not in tensors:
                raise KernelError(f"{name}: missing from the weight files")
        widths = list(entry.get("widths") or [])
        try:
            packed = cls(
                planes=tensors[f"{stem}.planes"],
                scales=tensors[f"{stem}.scales"],
                offset=tensors[f"{stem}.offset"] if entry.get("offset") else None,
                in_features=int(entry["in_features"]),
                group_size=int(entry["group_size"]),
                sorted=bool(entry.get("sorted", False)),
                narrow={
                    width: (
                        tensors[f"{stem}.scales_{width}"],
                        tensors[f"{stem}.offset_{width}"] if entry.get("offset") else None,
                    )
                    for width in widths[:-1]
                },
            )
        except KeyError as error:
            raise KernelError(f"{stem}: quantization_config lacks {error.args[0]!r}") from None
        except KernelError as error:
            raise KernelError(f"{stem}: {error}") from None
        if packed.bits != entry.get("bits", packed.bits):
            raise KernelError(f"{stem}: {packed.bits} planes in the file, bits = {entry['bits']} in the configuration")
        if widths and widths[-1] != packed.bits:
            raise KernelError(f"{stem}: widths = {widths} in the configuration, {packed.bits} planes in the file")
        return packed


@cache
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[256, 8]`: the signs of each byte, least significant bit first."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (2 * bits - 1).to(dtype).to(device)


def pack_signs(positive: Tensor) -> Tensor:
    """Packs bool `[..., in]` (True: +1) into uint8 `[..., ceil(in / 8)]`, least significant bit first, pad bits 0."""
    pad = -positive.shape[-1] % 8
    padded = torch.nn.functional.pad(positive.to(torch.uint8), (0, pad)).unflatten(-1, (-1, 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=positive.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)
