"""The native backends of the CPU: `cpu-fast`, `cpu-exact`, `cpu-dequantize`, and BiQGEMM as published.

Relative errors (root mean square, normal inputs): `cpu-fast` about 7e-3 from tables and 9e-3 from codes, `cpu-exact`
about 6e-5, `biqgemm` about 2e-7; `cpu-dequantize` gives the bits of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import native, ops
from hcx.kernels.format import MAX_BITS, PackedWeight

if TYPE_CHECKING:
    from hcx.kernels.registry import Spec

LINE_INPUTS = 32
"""Groups are a multiple of this, or as wide as the matrix."""


def _why_not(spec: Spec) -> str | None:
    if spec.device != "cpu":
        return f"it multiplies on the CPU, and the weight is on {spec.device}"
    absent = native.why_absent()
    if absent is not None:
        return absent
    if spec.group_size % LINE_INPUTS and spec.group_size < spec.in_features:
        return (
            f"groups of {spec.group_size} are not a multiple of {LINE_INPUTS} "
            f"and not the whole row of {spec.in_features}"
        )
    if not 1 <= spec.bits <= MAX_BITS:
        return f"{spec.bits} planes; 1 to {MAX_BITS} are served"
    return None


class _NativeBackend:
    """What the native backends share."""

    name: str
    numerics: str
    device = "cpu"

    def why_not(self, spec: Spec) -> str | None:
        """The library is absent, or the weight is elsewhere or of another kind."""
        return _why_not(spec)

    def prepack(self, weight: PackedWeight) -> native.NativeWeight:
        """The machine layout, in memory only."""
        return native.pack(weight)

    def matmul(self, x: Tensor, packed: native.NativeWeight) -> Tensor:
        """`x @ W^T`."""
        raise TypeError(f"{type(self).__name__} does not define matmul")

    def matmul_shared(self, x: Tensor, packed: Sequence[native.NativeWeight]) -> Tensor:
        """Products one after the other, concatenated."""
        return torch.cat([self.matmul(x, weight) for weight in packed], dim=-1)


class TableBackend(_NativeBackend):
    """Tables of four inputs, looked up by byte permutation; kernels/README.md describes the methods.

    Args:
        name: of the backend.
        numerics: its class.
        method: `fast` or `tables15`, see `native.METHODS`.
    """

    def __init__(self, name: str, numerics: str, method: str) -> None:
        self.name, self.numerics, self.method = name, numerics, method

    def matmul(self, x: Tensor, packed: native.NativeWeight) -> Tensor:
        """`x @ W^T`; differentiable in `x`."""
        return ops.matmul(x, [packed], self.method)

    def matmul_shared(self, x: Tensor, packed: Sequence[native.NativeWeight]) -> Tensor:
        """Products of weights with one input, concatenated; the tables are built once."""
        if len({weight.group_size for weight in packed}) > 1:
            return super().matmul_shared(x, packed)
        return ops.matmul(x, packed, self.method)


class BiQGEMMBackend(_NativeBackend):
    """BiQGEMM (Jeon et al. 2020): keys of eight inputs, fp32 tables, one matrix at a time. Chosen by name only."""

    name = "biqgemm"
    numerics = "exact"

    def prepack(self, weight: PackedWeight) -> native.NativeWeight:
        """Keys in the order in which they are looked up, in memory only."""
        return native.pack(weight, "biqgemm")

    def matmul(self, x: Tensor, packed: native.NativeWeight) -> Tensor:
        """`x @ W^T`; without gradients.

        Raises:
            KernelError: a gradient of `x` is wanted.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise KernelError("the kernel 'biqgemm' has no gradients; take cpu-exact, or cpu-dequantize")
        return native.biqgemm(x, packed)


class DequantizeBackend(_NativeBackend):
    """The reference product, bit for bit, with the dense copy made by the native library: some ten times as fast."""

    name = "cpu-dequantize"
    numerics = "reference"

    def matmul(self, x: Tensor, packed: native.NativeWeight) -> Tensor:
        """`x @ W^T` in fp32, in the dtype of `x`; differentiable in `x`. The dense copy lives only during the call."""
        return F.linear(x.float(), ops.dequantize(packed)).to(x.dtype)
