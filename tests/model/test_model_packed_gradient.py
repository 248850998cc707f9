"""Training on top of binary-coded weights: their gradient is the dense one's, and no dense copy waits for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcx.compress.bcq import quantize
from hcx.model.parts.base import PlainParts
from hcx.model.parts.linear import LinearPart
from hcx.model.parts.sources import BCQSource, LoRASource

ROWS, COLUMNS = 48, 64
STEMS = {"q": (ROWS, COLUMNS), "k": (24, COLUMNS)}


def source(seed: int = 0) -> tuple[BCQSource, Tensor]:
    """A packed fused matrix, and its dense form."""
    generator = torch.Generator().manual_seed(seed)
    packed = {
        stem: quantize(torch.randn(shape, generator=generator), 3, 32, scale_dtype=torch.float32)
        for stem, shape in STEMS.items()
    }
    return BCQSource(packed, differentiable=True), torch.cat([weight.dequantize() for weight in packed.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_input_is_that_of_the_dense_weight(dtype: torch.dtype) -> None:
    packed, dense = source()
    x = torch.randn(5, 2, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    outer = torch.randn(5, 2, ROWS + 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = packed(one), (other.float() @ dense.t()).to(dtype)
    assert torch.equal(found, packed(x))
    found.backward(outer)
    expected.backward(outer)
    assert one.grad is not None
    assert other.grad is not None
    # Each stem's gradient is rounded to bf16 before their sum, so half a unit in the last place per stem.
    tolerance = 1e-5 if dtype == torch.float32 else 2 * 2**-8 * float(other.grad.abs().max())
    torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance)


def test_no_dense_weight_is_kept_for_the_backward() -> None:
    packed, _ = source()
    part = LinearPart(PlainParts(), STEMS, "column")
    lora = LoRASource(packed, part.blocks, rank=2, alpha=4.0)
    x = torch.randn(3, 1, COLUMNS, requires_grad=True)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = lora(x)
    assert kept
    assert max(kept) < 24 * COLUMNS
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters())
