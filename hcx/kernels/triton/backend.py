"""The Triton kernels as backends of the registry, and why they cannot serve where they cannot.

This module imports no triton: the registry may ask it on any machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hcx.errors import MissingExtra
from hcx.kernels.format import PackedWeight
from hcx.kernels.triton.layout import GpuWeight, check_input, pack, why_not_group

if TYPE_CHECKING:
    from hcx.kernels.registry import Spec

MIN_CAPABILITY = 8
"""Major; bf16 matrix instructions and asynchronous copies begin with Ampere."""


@cache
def why_absent() -> str | None:
    """Why Triton kernels cannot run on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return str(MissingExtra("triton", "gpu", "the Triton backend"))
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < MIN_CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}; it needs {MIN_CAPABILITY}.0"
    return None


class TritonBackend:
    """Levels rounded to the 16 bits of the activations, products and sums in fp32 (`docs/gpu-kernels.md`).

    The class is `fast`: rounding a level to bf16 leaves 1.7e-3 of a product, to fp16 2e-4. That is what a dense
    16-bit copy of the weight would leave as well, but above the 6e-5 of `exact`. With fp32 activations it computes as
    `triton-exact`.
    """

    name = "triton"
    numerics = "fast"
    device = "cuda"
    exact = False

    def why_not(self, spec: Spec) -> str | None:
        """See `Backend.why_not`."""
        if spec.device != "cuda":
            return f"it runs on CUDA devices, and the weight is on {spec.device}"
        return why_absent() or why_not_group(spec.group_size, spec.in_features)

    def prepack(self, weight: PackedWeight) -> GpuWeight:
        """The words of `layout`, on the weight's device."""
        return pack(weight)

    def matmul(self, x: Tensor, packed: GpuWeight) -> Tensor:
        """`[..., in] -> [..., out]` in the dtype of `x`.

        Raises:
            KernelError: `x` has another width, dtype or device than the weight can be multiplied with.
        """
        from hcx.kernels.triton.ops import gpu_product

        check_input(x, packed.in_features, packed.codes.device)
        flat = x.reshape(-1, packed.in_features)
        if x.dtype == torch.float16 and not packed.fits_half:
            flat = flat.float()
        product = gpu_product(
            flat, packed.codes, packed.scales, packed.offset, packed.out_features, packed.group_size, self.exact
        )
        return product.to(x.dtype).view(*x.shape[:-1], packed.out_features)

    def matmul_shared(self, x: Tensor, packed: Sequence[GpuWeight]) -> Tensor:
        """Products of several weights with one input, concatenated."""
        return torch.cat([self.matmul(x, weight) for weight in packed], dim=-1)


class TritonExactBackend(TritonBackend):
    """Levels as the sum of two 16-bit numbers: twice the expansion, the same bytes.

    Two bf16 numbers hold a level to 2^-17 (two fp16 numbers to more), which leaves under 6e-5 of a product: `exact`.
    fp32 activations are split likewise.
    """

    name = "triton-exact"
    numerics = "exact"
    exact = True
