"""LUT-GEMM's table kernel on a GPU (kernels/cuda/lut_gemm.cu) as a backend: the faithful reproduction.

Not the default. Conflicts in the banks of shared memory bound it: by count it is behind the Triton kernels at 3 bits
and more, level with them at 2 and ahead only at 1 (docs/gpu-kernels.md). It is chosen by name, or where Triton is
missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hcx.kernels import cuda_build
from hcx.kernels.format import PackedWeight
from hcx.kernels.triton.layout import INPUT_DTYPES, check_input, why_not_group

if TYPE_CHECKING:
    from hcx.kernels.registry import Spec

SOURCE = "kernels/cuda/lut_gemm.cu"
THREADS = 256
BLOCK_ROWS = 1024
MAX_COLUMNS = 8
"""Batch columns of one launch; their tables fill shared memory."""
LAUNCHES = 4
"""Above this many launches' columns the weight is dequantized instead, once, in fp32."""
BLOCKS_PER_SM = 4
CODES = {dtype: code for code, dtype in enumerate(INPUT_DTYPES)}
"""HCX_INPUT and HCX_SCALE of the source."""


@dataclass(frozen=True)
class LutWeight:
    """A weight as the table kernel reads it.

    Attributes:
        words: int32 `[words of 32 inputs, q, out]`, an even number of them; bit `t` of a word is its input `t`.
        scales: `[groups, q, out]`.
        offset: fp32 `[groups, out]` or None.
        in_features, group_size: of the weight.
    """

    words: Tensor
    scales: Tensor
    offset: Tensor | None
    in_features: int
    group_size: int

    def canonical(self) -> PackedWeight:
        """The weight in the packed format again."""
        lines, bits, rows = self.words.shape
        planes = self.words.permute(1, 2, 0).contiguous().view(torch.uint8).view(bits, rows, 4 * lines)
        columns = -(-self.in_features // 8)
        return PackedWeight(
            planes[:, :, :columns].contiguous(),
            self.scales.permute(1, 2, 0).contiguous(),
            None if self.offset is None else self.offset.t().contiguous(),
            self.in_features,
            self.group_size,
        )


def pack(weight: PackedWeight) -> LutWeight:
    """Rearranges a weight so that neighbouring threads read neighbouring words."""
    padded = F.pad(weight.planes, (0, -weight.planes.shape[2] % 8)).contiguous()
    return LutWeight(
        words=padded.view(torch.int32).permute(2, 0, 1).contiguous(),
        scales=weight.scales.permute(2, 0, 1).contiguous(),
        offset=None if weight.offset is None else weight.offset.t().contiguous(),
        in_features=weight.in_features,
        group_size=weight.group_size,
    )


def configuration(weight: LutWeight, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """The macros of the kernel that multiplies `columns` activations of a dtype."""
    one_group = weight.group_size >= weight.in_features
    # Two words a step halve the barriers; 8 tables of 5 and more columns exceed 48 KiB of shared memory.
    words = 2 if columns <= MAX_COLUMNS // 2 and (one_group or weight.group_size % 64 == 0) else 1
    return {
        "HCX_BITS": weight.words.shape[1],
        "HCX_COLUMNS": columns,
        "HCX_WORDS": words,
        "HCX_GROUP": 32 * weight.words.shape[0] if one_group else weight.group_size,
        "HCX_SCALE": CODES[weight.scales.dtype],
        "HCX_INPUT": CODES[dtype],
    }


def num_steps(in_features: int, defines: dict[str, int]) -> int:
    """Steps over the inputs; the padding of the words may hold one more, which has no group."""
    return -(-in_features // (32 * defines["HCX_WORDS"]))


class LutBackend:
    """Sums of activations looked up in fp32 tables, added in fp32: `exact` (nothing is rounded but fp32 sums)."""

    name = "lut"
    numerics = "exact"
    device = "cuda"

    def why_not(self, spec: Spec) -> str | None:
        """See `Backend.why_not`."""
        if spec.device != "cuda":
            return f"it runs on CUDA devices, and the weight is on {spec.device}"
        if not torch.cuda.is_available():
            return "no CUDA device"
        return why_not_group(spec.group_size, spec.in_features) or cuda_build.why_no_compiler()

    def prepack(self, weight: PackedWeight) -> LutWeight:
        """See `pack`."""
        return pack(weight)

    def matmul(self, x: Tensor, packed: LutWeight) -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of `x`.

        Raises:
            KernelError: `x` has another width, dtype or device than the weight can be multiplied with.
        """
        check_input(x, packed.in_features, packed.words.device)
        flat = x.reshape(-1, packed.in_features)
        if flat.shape[0] > LAUNCHES * MAX_COLUMNS:
            dense = packed.canonical().dequantize(torch.float32)
            product = F.linear(flat.float(), dense).to(x.dtype)
        else:
            pieces = [_product(piece.contiguous(), packed) for piece in flat.split(MAX_COLUMNS) if piece.shape[0]]
            product = torch.cat(pieces) if pieces else x.new_empty(0, packed.words.shape[2])
        return product.view(*x.shape[:-1], packed.words.shape[2])

    def matmul_shared(self, x: Tensor, packed: Sequence[LutWeight]) -> Tensor:
        """Products of several weights with one input, concatenated."""
        return torch.cat([self.matmul(x, weight) for weight in packed], dim=-1)


def _product(x: Tensor, packed: LutWeight) -> Tensor:
    columns, inputs = x.shape
    rows = packed.words.shape[2]
    defines = configuration(packed, columns, x.dtype)
    steps = num_steps(inputs, defines)
    blocks = -(-rows // BLOCK_ROWS)
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    per_split = -(-steps // max(1, min(steps, BLOCKS_PER_SM * sms // blocks)))
    splits = -(-steps // per_split)
    partial = x.new_empty(splits, columns, rows, dtype=torch.float32)
    arguments = (x, packed.words, packed.scales, packed.offset, partial, rows, inputs, x.stride(0), steps, per_split)
    cuda_build.launch(SOURCE, "hcx_lut_gemm", defines, (blocks, splits), THREADS, arguments)
    return partial.sum(0).to(x.dtype)
