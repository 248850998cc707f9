"""The reference product: dequantize, then multiply with fp32 accumulation. Correct everywhere, fast nowhere.

It serves from the packed weights: the dense copy lives only during the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hcx.kernels.format import PackedWeight

if TYPE_CHECKING:
    from hcx.kernels.registry import Spec


class ReferenceBackend:
    """Plain torch on any device."""

    name = "reference"
    numerics = "reference"
    device = "any"

    def why_not(self, spec: Spec) -> str | None:
        """It serves everything."""
        return None

    def prepack(self, weight: PackedWeight) -> PackedWeight:
        """The canonical form is used as it is."""
        return weight

    def matmul(self, x: Tensor, packed: PackedWeight) -> Tensor:
        """`x @ W^T` in fp32, in the dtype of `x`."""
        return F.linear(x.float(), packed.dequantize(torch.float32)).to(x.dtype)

    def matmul_shared(self, x: Tensor, packed: Sequence[PackedWeight]) -> Tensor:
        """Products one after the other, concatenated."""
        return torch.cat([self.matmul(x, weight) for weight in packed], dim=-1)
