"""Pruned binary-coded weights: planes, scales, and a mask of the weights that are kept; raw or encoded on disk.

`W[r, k] = mask[r, k] * (sum_i scales[i] * (2 plane_i - 1) + offset)`. Signs cannot express a zero, but one more plane
can: with codes `c = plane AND mask` as signs `s_i` and the mask itself as signs `s_m`,

    mask * (sum_i a_i b_i + z)  =  sum_i a_i s_i  +  (z - A) / 2 * s_m  +  (z + A) / 2,        A = sum_i a_i,

so every kernel serves a pruned weight of `q` planes as one of `q + 1` planes with an offset (`MaskedWeight.to_packed`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import gf2
from hcx.kernels.format import MAX_BITS, PackedWeight, pack_signs

KIND = "fixed_to_fixed"
MASKS = ("raw", "deflate")
Traversal = Literal["rows", "columns", "scattered"]
TRAVERSALS: tuple[Traversal, ...] = ("rows", "columns", "scattered")
Bytes = NDArray[np.uint8]
_ONES_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


@dataclass(frozen=True)
class FixedToFixed:
    """How planes are encoded (Park et al., ICLR 2022, sections 3 and 4).

    Attributes:
        n_in: bits of a code word.
        n_out: bits of a block; `floor(n_in / kept fraction)` if None, the rate at which the code just suffices.
        n_s: registers: 0 (each block alone) to 2; more registers lose fewer bits and take longer to encode.
        segment: blocks between resets of the registers; the default of `n_s` if None.
        traversal: order in which bits are streamed; the one with the steadier number of kept bits per block if None.
        seed: of the XOR gates.
    """

    n_in: int = 8
    n_out: int | None = None
    n_s: int = 1
    segment: int | None = None
    traversal: Traversal | None = None
    seed: int = 0


@dataclass(frozen=True)
class MaskedWeight:
    """One pruned weight.

    Attributes:
        packed: planes, scales and offset; planes are 0 where the mask is.
        mask: uint8 `[out, ceil(in / 8)]`, bits as in a plane, 1 where a weight is kept; pad bits 0.
    """

    packed: PackedWeight
    mask: Tensor

    def __post_init__(self) -> None:
        expected = tuple(self.packed.planes.shape[1:])
        if self.mask.dtype != torch.uint8 or tuple(self.mask.shape) != expected:
            raise KernelError(f"mask is {self.mask.dtype} {tuple(self.mask.shape)}; expected uint8 {expected}")
        pad = self.packed.in_features % 8
        if pad and bool((self.mask[:, -1] >> pad).any()):
            raise KernelError("the mask keeps weights beyond the last input")
        # Bits of pruned weights mean nothing: one value for all makes equal weights equal bytes.
        object.__setattr__(self, "packed", replace(self.packed, planes=self.packed.planes & self.mask, sorted=False))

    @classmethod
    def of(cls, packed: PackedWeight, kept: Tensor) -> MaskedWeight:
        """From a bool mask `[out, in]`, True where a weight is kept."""
        return cls(packed, pack_signs(kept))

    @property
    def bits(self) -> int:
        """Planes, without the mask."""
        return self.packed.bits

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.packed.out_features

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.packed.in_features

    def kept(self) -> Tensor:
        """The mask as bool `[out, in]`."""
        bits = np.unpackbits(self.mask.numpy(), axis=1, count=self.in_features, bitorder="little")
        return torch.from_numpy(bits.astype(bool))

    @property
    def density(self) -> float:
        """Share of weights that are kept."""
        return _ones(self.mask.numpy()) / (self.out_features * self.in_features)

    @cached_property
    def stored_mask(self) -> Tensor:
        """The mask as stored: raw `[out, ceil(in / 8)]`, or deflated `[bytes]` where that is smaller."""
        # Bytes of a random mask have uneven frequencies and no repetitions: Huffman codes alone come near the entropy.
        deflater = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
        deflated = deflater.compress(self.mask.numpy().tobytes()) + deflater.flush()
        if len(deflated) >= self.mask.numel():
            return self.mask.contiguous()
        return torch.frombuffer(bytearray(deflated), dtype=torch.uint8)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of planes, scales, offset and mask."""
        return self.packed.size_bytes + self.stored_mask.numel()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, kept or not, with everything counted."""
        return 8 * self.size_bytes / (self.out_features * self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight `[out, in]`, exactly 0 where it is pruned."""
        return self.packed.dequantize(dtype).masked_fill_(~self.kept(), 0)

    def to_packed(self) -> PackedWeight:
        """The same weight in `bits + 1` planes with an offset, which every kernel serves; scales are then fp32.

        Pruned weights are exactly 0 where there was no offset; kept ones agree with `dequantize` to rounding.

        Raises:
            KernelError: it has 8 planes already.
        """
        if self.bits >= MAX_BITS:
            raise KernelError(f"a pruned weight is served with a plane more; {MAX_BITS} planes leave no room for it")
        scales = self.packed.scales.float()
        total = scales[0].clone()
        for plane in scales[1:]:  # in the order of `dequantize`: what is pruned then cancels exactly
            total += plane
        offset = torch.zeros_like(total) if self.packed.offset is None else self.packed.offset
        return PackedWeight(
            planes=torch.cat([self.packed.planes, self.mask[None]]),
            scales=torch.cat([scales, ((offset - total) / 2)[None]]),
            offset=(offset + total) / 2,
            in_features=self.in_features,
            group_size=self.packed.group_size,
        )

    def to_tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors as stored: those of `packed`, and `STEM.mask`."""
        return {**self.packed.to_tensors(stem), f"{stem}.mask": self.stored_mask}

    def describe(self) -> dict[str, Any]:
        """The module's entry in `quantization_config.modules`."""
        if self.stored_mask.dim() == 2:
            return {**self.packed.describe(), "mask": "raw"}
        return {**self.packed.describe(), "mask": "deflate", "mask_bytes": self.stored_mask.numel()}

    def encode(self, settings: FixedToFixed | None = None, threads: int = 0) -> EncodedWeight:
        """Its planes as code words of fixed length; the mask stays as it is.

        Raises:
            KernelError: a setting is out of range.
        """
        return _encode(self, settings or FixedToFixed(), threads)


@dataclass(frozen=True)
class EncodedWeight:
    """A pruned weight whose planes are stored as code words and corrections.

    Attributes:
        weight: the same weight, as it will be read back.
        codes: uint8 `[q, bytes]`.
        corrections: of each plane, uint8.
        network: the XOR gates.
        segment: blocks between resets.
        traversal: order of the stream.
        inverted: whether a plane is complemented.
        errors: corrections of each plane.
        variation: kept bits per block, standard deviation over mean.
    """

    weight: MaskedWeight
    codes: Tensor
    corrections: tuple[Bytes, ...]
    network: gf2.Network = field(repr=False)
    segment: int
    traversal: Traversal
    inverted: tuple[bool, ...]
    errors: tuple[int, ...]
    variation: float

    @property
    def plane_bytes(self) -> int:
        """Bytes in the place of the planes: code words, corrections and the gates."""
        return self.codes.numel() + sum(len(part) for part in self.corrections) + self.network.packed.size

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, with mask, scales and offset."""
        return self.weight.size_bytes - self.weight.packed.planes.numel() + self.plane_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, kept or not, with everything counted."""
        return 8 * self.size_bytes / (self.weight.out_features * self.weight.in_features)

    @property
    def efficiency(self) -> float:
        """Share of kept bits that are right before correction."""
        kept = _ones(self.weight.mask.numpy()) * self.weight.bits
        return 1 - sum(self.errors) / kept if kept else 1.0

    @property
    def saves_bytes(self) -> bool:
        """Whether code words and mask take less than the planes of the same weight without pruning."""
        return self.plane_bytes + self.weight.stored_mask.numel() < self.weight.packed.planes.numel()

    def summary(self) -> str:
        """The numbers by which it is accepted or refused."""
        count = self.weight.out_features * self.weight.in_features
        planes, mask = 8 * self.plane_bytes / count, 8 * self.weight.stored_mask.numel() / count
        return (
            f"{self.weight.density:.1%} of the weights kept, {self.efficiency:.2%} of their bits right before "
            f"correction (kept bits per block vary by {self.variation:.2f} of their mean): {planes:.3f} bits per "
            f"weight for the planes, {planes + mask:.3f} with the mask, where {self.weight.bits} planes without "
            f"pruning take {8 * self.weight.packed.planes.numel() / count:.3f}"
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight `[out, in]`."""
        return self.weight.dequantize(dtype)

    def to_packed(self) -> PackedWeight:
        """See `MaskedWeight.to_packed`."""
        return self.weight.to_packed()

    def to_tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors as stored; `STEM.codes`, `STEM.corrections` and `STEM.network` in the place of `STEM.planes`."""
        tensors = self.weight.to_tensors(stem)
        del tensors[f"{stem}.planes"]
        return tensors | {
            f"{stem}.codes": self.codes,
            f"{stem}.corrections": torch.from_numpy(np.concatenate(self.corrections)),
            f"{stem}.network": torch.from_numpy(self.network.packed.copy()),
        }

    def describe(self) -> dict[str, Any]:
        """The module's entry in `quantization_config.modules`."""
        planes = [plane.numpy().tobytes() for plane in self.weight.packed.planes]
        encoding = {
            "kind": KIND,
            "n_in": self.network.n_in,
            "n_out": self.network.n_out,
            "n_s": self.network.n_s,
            "segment": self.segment,
            "traversal": self.traversal,
            "inverted": list(self.inverted),
            "correction_bytes": [len(part) for part in self.corrections],
            "errors": list(self.errors),
            "stored_crc32": _stored_crc(self.to_tensors("")),
            "plane_crc32": [zlib.crc32(plane) for plane in planes],
        }
        return {**self.weight.describe(), "encoding": encoding}


def _encode(weight: MaskedWeight, settings: FixedToFixed, threads: int) -> EncodedWeight:
    density = weight.density
    n_out = settings.n_out or (gf2.code_rate_outputs(settings.n_in, 1 - density) if density else gf2.MAX_OUT)
    network = gf2.Network.draw(settings.n_in, n_out, settings.n_s, settings.seed)
    segment = gf2.SEGMENTS[settings.n_s] if settings.segment is None else settings.segment
    rows = weight.mask.numpy()
    streams: dict[Traversal, Bytes] = {
        order: _stream(rows, order) for order in TRAVERSALS if settings.traversal in (None, order)
    }
    variations = {order: _variation(stream, n_out) for order, stream in streams.items()}
    traversal = min(variations, key=lambda order: variations[order])
    mask = streams[traversal]
    num_bits = 8 * mask.size
    codes, corrections, inverted, errors = [], [], [], []
    for plane in weight.packed.planes.numpy():
        target = _stream(plane, traversal)
        # A linear code always has the all-zero word, and nothing comparable for ones.
        invert = 2 * _ones(plane & rows) > _ones(rows)
        target = ~target if invert else target
        words, wrong = gf2.encode(target, mask, network, num_bits, segment, threads=threads)
        decoded = gf2.decode(words, network, num_bits, segment, threads)
        listed = gf2.corrections_of(decoded, target, mask, network, num_bits)
        if ((gf2.correct(decoded, listed, network, num_bits) ^ target) & mask).any():
            raise KernelError("the encoder's words do not give the plane back: a mistake of this library, not yours")
        codes.append(torch.from_numpy(words))
        corrections.append(listed)
        inverted.append(invert)
        errors.append(wrong)
    return EncodedWeight(
        weight,
        torch.stack(codes),
        tuple(corrections),
        network,
        segment,
        traversal,
        tuple(inverted),
        tuple(errors),
        variations[traversal],
    )


def read_masked(stem: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> MaskedWeight:
    """Reads what `to_tensors` and `describe` of a masked or an encoded weight wrote.

    Raises:
        KernelError: a tensor is missing, cut short or damaged, shapes disagree, or the encoding is unknown.
    """
    encoding = entry.get("encoding")
    if encoding is not None and entry.get("mask") is None:
        raise KernelError(f"{stem}: the option 'encoding' = {encoding!r} is not supported without a mask")
    if entry.get("mask") not in MASKS:
        raise KernelError(
            f"{stem}: mask = {entry.get('mask')!r} is not supported by this version of hcx; supported: "
            f"{', '.join(MASKS)}"
        )
    if encoding is not None and (not isinstance(encoding, Mapping) or encoding.get("kind") != KIND):
        raise KernelError(f"{stem}: the option 'encoding' = {encoding!r} is not supported by this version of hcx")
    plain = {key: value for key, value in entry.items() if key not in ("mask", "mask_bytes", "encoding")}
    try:
        mask = _mask(_tensor(tensors, f"{stem}.mask"), entry)
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise KernelError(f"{stem}: the mask is damaged or cut short ({error!r})") from None
    if encoding is not None:
        try:
            planes = _decode(stem, tensors, entry, encoding, mask)
        except (KeyError, TypeError, ValueError) as error:
            raise KernelError(f"{stem}: the entry of its encoding is damaged ({error!r})") from None
        except KernelError as error:
            raise KernelError(f"{stem}: {error}") from None
        tensors = {**tensors, f"{stem}.planes": planes}
    try:
        return MaskedWeight(PackedWeight.from_tensors(stem, tensors, plain), mask)
    except KernelError as error:
        text = str(error)
        raise KernelError(text if text.startswith(stem) else f"{stem}: {text}") from None


def _decode(
    stem: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any], encoding: Mapping[str, Any], mask: Tensor
) -> Tensor:
    found = {name: _tensor(tensors, f"{stem}.{name}") for name in ("codes", "corrections", "network")}
    bits, rows, columns = int(entry["bits"]), int(entry["out_features"]), -(-int(entry["in_features"]) // 8)
    if not 1 <= bits <= MAX_BITS or tuple(mask.shape) != (rows, columns) or mask.dtype != torch.uint8:
        raise KernelError(f"mask is {mask.dtype} {tuple(mask.shape)}; expected uint8 {(rows, columns)}")
    whole = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == stem}
    if _stored_crc({name.removeprefix(stem): tensor for name, tensor in whole.items()}) != encoding["stored_crc32"]:
        raise KernelError("the encoded stream is damaged or cut short: its check sum differs; copy the file again")
    n_in, n_out, n_s = (int(encoding[key]) for key in ("n_in", "n_out", "n_s"))
    network = gf2.Network.from_packed(found["network"].numpy(), n_in, n_out, n_s)
    traversal, segment = encoding["traversal"], int(encoding["segment"])
    if traversal not in TRAVERSALS:
        raise KernelError(
            f"traversal = {traversal!r} is not supported by this version of hcx; supported: {', '.join(TRAVERSALS)}"
        )
    codes, corrections = found["codes"].numpy(), found["corrections"].numpy()
    lengths, inverted, checks = (list(encoding[key]) for key in ("correction_bytes", "inverted", "plane_crc32"))
    if codes.ndim != 2 or not codes.shape[0] == len(lengths) == len(inverted) == len(checks) == bits:
        raise KernelError(f"code words {codes.shape} and the entry of {len(lengths)} planes; expected {bits} planes")
    if min(lengths) < 1 or sum(lengths) != corrections.size:
        raise KernelError(f"{corrections.size} bytes of corrections; the entry names {lengths}")
    num_bits = 8 * (rows * columns if traversal == "rows" else 8 * columns * -(-rows // 8))
    planes, end = [], 0
    for plane, length in enumerate(lengths):
        begin, end = end, end + length
        stream = gf2.decode(codes[plane], network, num_bits, segment)
        gf2.correct(stream, corrections[begin:end], network, num_bits)
        stream = ~stream if inverted[plane] else stream
        if traversal == "scattered":
            stream = _gathered(stream)
        if traversal != "rows":
            stream = gf2.transpose_bits(stream.reshape(8 * columns, -1))[:rows, :columns]
        kept = np.ascontiguousarray(stream.reshape(rows, columns)) & mask.numpy()
        if zlib.crc32(kept.tobytes()) != checks[plane]:
            raise KernelError(f"plane {plane} does not decode to what was encoded: its check sum differs")
        planes.append(torch.from_numpy(kept))
    return torch.stack(planes)


def _mask(stored: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The mask's bytes; a stream that would give more than they are is not followed to its end."""
    if entry["mask"] == "raw":
        return stored
    rows, columns = int(entry["out_features"]), -(-int(entry["in_features"]) // 8)
    if stored.dtype != torch.uint8 or rows < 1 or columns < 1:
        raise ValueError(f"{stored.dtype} for {rows} rows of {columns} bytes")
    inflater = zlib.decompressobj()
    data = inflater.decompress(stored.numpy().tobytes(), rows * columns + 1)
    if len(data) != rows * columns or not inflater.eof or inflater.unused_data:
        raise ValueError(f"{len(data)} bytes where {rows * columns} are due")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, columns)


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise KernelError(f"{name}: missing from the weight files")
    return tensors[name].contiguous()


def _stream(rows: Bytes, traversal: Traversal) -> Bytes:
    """The bits of a plane in the order in which they are encoded."""
    if traversal == "rows":
        return np.ascontiguousarray(rows).ravel()
    turned = gf2.transpose_bits(rows).ravel()
    return turned if traversal == "columns" else turned[_scattering(turned.size)]


def _scattering(size: int) -> NDArray[np.int64]:
    """Where each byte of a scattered stream comes from: multiples of about 0.618 of the size, which shares no factor.

    A byte of the transpose is 8 rows of one column; bytes that follow each other in the stream are then of distant
    columns and rows, so a block has the mean density wherever kept weights crowd together.
    """
    step = size * 618 // 1000 + 1
    while gcd(step, size) > 1:
        step += 1
    return np.arange(size, dtype=np.int64) * step % size


def _gathered(stream: Bytes) -> Bytes:
    turned = np.empty_like(stream)
    turned[_scattering(stream.size)] = stream
    return turned


def _stored_crc(tensors: Mapping[str, Tensor]) -> int:
    """Of everything that decoding depends on, so that no damage goes unseen, not even of bits that nobody reads."""
    check = 0
    for name in sorted(tensors):
        if name.rpartition(".")[2] in ("codes", "corrections", "mask", "network"):
            check = zlib.crc32(tensors[name].contiguous().numpy().tobytes(), check)
    return check


def _variation(mask: Bytes, n_out: int) -> float:
    """Standard deviation over mean of the kept bits of a block."""
    bits = np.unpackbits(mask, bitorder="little")
    counts = bits[: bits.size // n_out * n_out].reshape(-1, n_out).sum(1, dtype=np.int32)
    return float(counts.std() / counts.mean()) if counts.size and counts.any() else 0.0


def _ones(data: Bytes) -> int:
    return int(_ONES_OF_BYTE[data].sum(dtype=np.int64))
