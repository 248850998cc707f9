"""How a binary-coded weight lies in GPU memory: words whose nibbles select bytes of a small table of levels.

The planes are split into parts. The weight is the sum over parts of a table entry, and the bits of the planes of a
part form the entry's index. A byte permutation (`prmt`) looks up four bytes at once with four nibbles as indices, so
a word is stored such that a mask (and at most one shift) turns it into eight nibbles; nothing is extracted bit by
bit.

A word covers 32 neighbouring inputs of one row; input `8 i + n` of them is nibble `n` of selector `i`, `i < 4`:

    kind 1 (1 plane)   A >> i, lowest bit of each nibble
    kind 2 (2 planes)  A, A >> 2, B, B >> 2, two lowest bits of each nibble
    kind 3 (3 planes)  A, B, C, three lowest bits of each nibble; the highest bits of A, B, C are those of selector 3
    kind 4 (4 planes)  A, B, C as in kind 3 and a word of signs: planes 1 to 3 are stored relative to plane 0 (without
                       an offset half of the levels are the others negated: a table of half of them and a sign suffice);
                       input `4 j + m` is negative if bit `8 m + 7 - j` is 1

In memory: `[out / 16, in / tile, q, 16, 4 * words]` int32, where a tile is `4 * words * 32` inputs and each quarter
of it lies within one group: four neighbouring threads take a quarter each, and a thread's table serves `words` words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels.format import PackedWeight, pack_signs

PARTS = {1: (1,), 2: (2,), 3: (3,), 4: (4,), 5: (3, 2), 6: (3, 3), 7: (4, 3), 8: (4, 4)}
"""Planes of each part, by bits."""
ROWS = 64
"""Rows are padded to a multiple of this, so that no kernel masks its weights."""
ROW_BLOCK = 16
_CHUNK_BITS = 1 << 24
"""Bits that are rearranged at once while packing; bounds the memory that it takes (16 bytes a bit)."""
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class GpuWeight:
    """A weight as the Triton kernels read it.

    Attributes:
        codes: int32 `[rows / 16, tiles, q, 16, 4 * words]`, see the module.
        scales: `[groups, q, rows]` in the stored dtype; zero in padded rows.
        offset: fp32 `[groups, rows]` or None.
        out_features, in_features, group_size: of the weight, without padding.
        words: 32-input words of a row that share a group and a thread: 1, 2 or 4.
        fits_half: whether every level is a finite fp16 number.
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor | None
    out_features: int
    in_features: int
    group_size: int
    words: int
    fits_half: bool

    @property
    def bits(self) -> int:
        """Planes."""
        return self.codes.shape[2]

    @property
    def size_bytes(self) -> int:
        """Bytes that one product reads of the weight."""
        tensors = [self.codes, self.scales, *([] if self.offset is None else [self.offset])]
        return sum(t.numel() * t.element_size() for t in tensors)


def why_not_group(group_size: int, in_features: int) -> str | None:
    """Why the layout cannot hold groups of this size; None if it can."""
    if group_size % 32 == 0 or group_size >= in_features:
        return None
    return f"groups of {group_size} inputs; it needs a multiple of 32, or one group per row"


def check_input(x: Tensor, in_features: int, device: torch.device) -> None:
    """Refuses what no GPU kernel can multiply.

    Raises:
        KernelError: `x` has another width, dtype or device than the weight can be multiplied with.
    """
    if x.shape[-1] != in_features:
        raise KernelError(f"the input has {x.shape[-1]} features, the weight takes {in_features}")
    if x.dtype not in INPUT_DTYPES:
        raise KernelError(f"the input is {x.dtype}; the GPU kernels take fp16, bf16 and fp32")
    if x.device != device:
        raise KernelError(f"the input is on {x.device}, the weight on {device}")


def words_per_group(group_size: int, in_features: int) -> int:
    """32-input words that a thread takes from one group: 4, 2 or 1."""
    if group_size >= in_features:
        return 4
    return next(words for words in (4, 2, 1) if group_size % (32 * words) == 0)


def num_tiles(in_features: int, words: int) -> int:
    """Tiles of `128 * words` inputs, the last padded."""
    return -(-in_features // (128 * words))


def pack(weight: PackedWeight) -> GpuWeight:
    """Rearranges a weight for the GPU, on the device where it lies.

    Raises:
        KernelError: its groups cannot be held.
    """
    reason = why_not_group(weight.group_size, weight.in_features)
    if reason is not None:
        raise KernelError(f"the Triton kernels do not take {reason}")
    words = words_per_group(weight.group_size, weight.in_features)
    tiles = num_tiles(weight.in_features, words)
    padded_rows = -weight.out_features % ROWS
    padded_bytes = tiles * 16 * words - weight.planes.shape[2]
    planes = F.pad(weight.planes, (0, padded_bytes, 0, padded_rows))
    bits, rows, columns = planes.shape
    step = max(1, _CHUNK_BITS // (bits * columns * 8))
    coded = torch.cat([_encode(part) for part in planes.split(step, dim=1)], dim=1)
    codes = coded.view(bits, rows // ROW_BLOCK, ROW_BLOCK, tiles, 4 * words).permute(1, 3, 0, 2, 4).contiguous()
    largest = weight.scales.float().abs().sum(0)
    if weight.offset is not None:
        largest = largest + weight.offset.abs()
    return GpuWeight(
        codes=codes,
        scales=pack_scales(weight.scales),
        offset=None if weight.offset is None else F.pad(weight.offset.t(), (0, padded_rows)).contiguous(),
        out_features=weight.out_features,
        in_features=weight.in_features,
        group_size=weight.group_size,
        words=words,
        fits_half=bool(largest.max() <= _HALF_MAX),
    )


def pack_scales(scales: Tensor) -> Tensor:
    """Canonical `[q, out, groups]` as `[groups, q, rows]`; differentiable, so that trained scales stay canonical."""
    return F.pad(scales.permute(2, 0, 1), (0, -scales.shape[1] % ROWS)).contiguous()


def unpack_planes(weight: GpuWeight) -> Tensor:
    """The canonical planes, uint8 `[q, out, ceil(in / 8)]`: the inverse of `pack`."""
    blocks, tiles, bits, _, line = weight.codes.shape
    coded = weight.codes.permute(2, 0, 3, 1, 4).reshape(bits, blocks * ROW_BLOCK, tiles * line)
    positive = _decode(coded).flatten(2)[:, : weight.out_features, : weight.in_features]
    return pack_signs(positive.bool())


def _encode(planes: Tensor) -> Tensor:
    """uint8 `[q, rows, bytes]` -> int32 words `[q, rows, bytes / 4]`."""
    shifts = torch.arange(8, device=planes.device, dtype=torch.uint8)
    # [q, rows, word, selector i, nibble n]
    bits = ((planes[..., None] >> shifts) & 1).unflatten(2, (-1, 4)).long()
    nibble = 4 * torch.arange(8, device=planes.device)
    coded: list[Tensor] = []
    for kind, part in zip(PARTS[bits.shape[0]], bits.split(PARTS[bits.shape[0]]), strict=True):
        if kind == 1:
            selector = torch.arange(4, device=planes.device)[:, None]
            coded.append((part[0] << (nibble + selector)).sum((-2, -1)))
        elif kind == 2:
            index = part[0] | part[1] << 1
            coded += [((index[..., i, :] | index[..., i + 1, :] << 2) << nibble).sum(-1) for i in (0, 2)]
        else:
            negative = 1 - part[0] if kind == 4 else torch.zeros_like(part[0])
            index = sum((part[i + kind - 3] ^ negative) << i for i in range(3))
            coded += [((index[..., i, :] | (index[..., 3, :] >> i & 1) << 3) << nibble).sum(-1) for i in range(3)]
            if kind == 4:
                position = torch.arange(32, device=planes.device)
                where = 8 * (position % 4) + 7 - position // 4
                coded.append((negative.flatten(-2) << where).sum(-1))
    words = torch.stack(coded)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _decode(coded: Tensor) -> Tensor:
    """int32 words `[q, rows, words]` -> bits `[q, rows, words, 32]`."""
    words = coded.long() & 0xFFFFFFFF
    position = torch.arange(32, device=coded.device)
    selector, nibble = position // 8, 4 * (position % 8)
    planes: list[Tensor] = []
    for kind, part in zip(PARTS[coded.shape[0]], words[..., None].split(PARTS[coded.shape[0]]), strict=True):
        if kind == 1:
            planes.append(part[0] >> (nibble + selector) & 1)
        elif kind == 2:
            index = torch.where(selector < 2, part[0], part[1]) >> (nibble + 2 * (selector % 2))
            planes += [index & 1, index >> 1 & 1]
        else:
            last = sum((part[i] >> (nibble + 3) & 1) << i for i in range(3))
            index = torch.where(
                selector == 3,
                last,
                torch.where(selector == 2, part[2], torch.where(selector == 1, part[1], part[0])) >> nibble,
            )
            bits = [index >> i & 1 for i in range(3)]
            if kind == 4:
                negative = part[3] >> (8 * (position % 4) + 7 - position // 4) & 1
                bits = [1 - negative, *(bit ^ negative for bit in bits)]
            planes += bits
    return torch.stack(planes)
