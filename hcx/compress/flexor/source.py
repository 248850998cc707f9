"""Linear layers whose signs come out of a network of XOR gates (Lee et al., FleXOR, NeurIPS 2020).

`W = sum_i alpha_i y_i`, `y_r = (-1)^(n_r - 1) prod_(j in taps of r) sign(x_j)`. Backward: the sign's derivative is
`S (1 - tanh^2(S x))`, and the other factors of a product stay signs (equation 6), so that long products do not shrink
the gradient. The weight is made anew in the backward pass: what is kept of a layer is its keys and its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hcx.compress.flexor.network import Matrix
from hcx.errors import ConfigError
from hcx.model.naming import CanonicalSlice, ParameterMap
from hcx.model.parts.sources import LinearBlock, WeightSource, work_dtype


class SignTanh(torch.autograd.Function):
    """`sign(x)` with sign(0) = +1; backward as `tanh(steepness x)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steepness: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.steepness = steepness
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        s = ctx.steepness
        return grad * s * (1.0 - torch.tanh(s * x).square()), None


def expand(keys: Tensor, matrix: Matrix, in_features: int, steepness: float) -> Tensor:
    """Keys `[out, slices * n_in]` -> signs `[out, in]`, differentiable."""
    n_in = matrix.shape[1]
    signs: Tensor = SignTanh.apply(keys, steepness)
    words = signs.unflatten(1, (-1, n_in))
    rows = [torch.tensor([j for j in range(n_in) if row[j]], device=keys.device) for row in matrix]
    counts = {len(row) for row in rows}
    if len(counts) == 1:
        (taps,) = counts
        columns = torch.stack(rows)  # [n_out, taps]
        result = words[..., columns[:, 0]]
        for tap in range(1, taps):
            result = result * words[..., columns[:, tap]]
        result = result * (-1.0) ** (taps - 1)
    else:
        result = torch.stack([words[..., row].prod(-1) * (-1.0) ** (len(row) - 1) for row in rows], dim=-1)
    return result.flatten(1)[:, :in_features]


class _FlexorProduct(torch.autograd.Function):
    """`x W^T`, the weight generated in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: FlexorSource, *parameters: Tensor) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(x, *parameters)
        return F.linear(x, source.dense(parameters, work_dtype(x)).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        work = work_dtype(x)
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        with torch.enable_grad():
            weight = ctx.source.dense(leaves, work)
        # In the precision of the activations, as for a dense weight: in fp32 both products take four times as long.
        outer = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        gradients = torch.autograd.grad(weight, leaves, outer.to(work))
        back = grad @ weight.detach().to(x.dtype) if ctx.needs_input_grad[0] else None
        return back, None, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))


class FlexorSource(WeightSource):
    """One weight as keys and scales.

    Args:
        keys: one `[local out, local slices * n_in]` per plane.
        scales: one `[local out, local groups]` per plane; where groups are whole rows, the same on every rank that
            shares the rows.
        networks: one per plane, all different.
        block: which part this rank holds, the only one of its matrix.
        group_size: inputs per scale.

    Raises:
        ConfigError: a slice or a group would be split over ranks.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        scales: Sequence[Tensor],
        networks: Sequence[Matrix],
        block: LinearBlock,
        group_size: int,
    ) -> None:
        super().__init__()
        self.block, self.networks = block, tuple(networks)
        self.steepness = 1.0
        """S of the backward; set before each step."""
        (rows, columns), (row, column) = block.global_shape, block.offset
        n_out, n_in = networks[0].shape
        self._group = min(group_size, columns)
        check_split(block, n_out, self._group)
        shared = scales_are_shared(block, self._group)
        self._places = {
            "keys": ((rows, -(-columns // n_out) * n_in), (row, column // n_out * n_in)),
            "scales": ((rows, -(-columns // self._group)), (row, 0 if shared else column // self._group)),
        }
        for plane, (key, scale) in enumerate(zip(keys, scales, strict=True)):
            self.register_parameter(f"keys_{plane}", nn.Parameter(key))
            self.register_parameter(f"scales_{plane}", nn.Parameter(scale))
            # Every rank's share of the row contributes to the gradient of the row's one scale.
            self.get_parameter(f"scales_{plane}").tp_partial_gradient = shared  # type: ignore[attr-defined]

    @property
    def planes(self) -> int:
        """Planes."""
        return len(self.networks)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _FlexorProduct.apply(x, self, *self.parameters_in_order())
        return result

    def parameters_in_order(self) -> list[Tensor]:
        """Keys of every plane, then scales of every plane."""
        return [self.get_parameter(f"{kind}_{plane}") for kind in ("keys", "scales") for plane in range(self.planes)]

    def dense(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`[out, in]` of this rank, summed in the order of `PackedWeight.dequantize`."""
        return dense_weight(
            [parameter.to(dtype) for parameter in parameters[: self.planes]],
            [parameter.to(dtype) for parameter in parameters[self.planes :]],
            self.networks,
            self.block.in_features,
            self._group,
            self.steepness,
        )

    def canonical(self) -> ParameterMap:
        rows = (0, self.block.out_features)
        return {
            f"{kind}_{plane}": (CanonicalSlice(f"{self.block.stem}.{kind}.{plane}", shape, offset, rows),)
            for plane in range(self.planes)
            for kind, (shape, offset) in self._places.items()
        }


def scales_are_shared(block: LinearBlock, group_size: int) -> bool:
    """Whether ranks hold parts of a row that has one scale."""
    return block.in_features < block.global_shape[1] and group_size >= block.global_shape[1]


def check_split(block: LinearBlock, n_out: int, group_size: int) -> None:
    """Raises ConfigError where a slice or a group of inputs would be split over ranks."""
    local = block.in_features
    if local == block.global_shape[1]:
        return
    if local % n_out or (not scales_are_shared(block, group_size) and local % group_size):
        raise ConfigError(
            f"flexor: slices of {n_out} and groups of {group_size} inputs must divide the {local} inputs of "
            f"{block.stem} that one of engine.tensor_parallel = {block.tp_size} ranks holds"
        )


def dense_weight(
    keys: Sequence[Tensor],
    scales: Sequence[Tensor],
    networks: Sequence[Matrix],
    in_features: int,
    group_size: int,
    steepness: float = 1.0,
) -> Tensor:
    """The weight `[out, in]` that keys and scales stand for, differentiable in both."""
    total: Tensor | None = None
    groups = scales[0].shape[1]
    pad = groups * group_size - in_features if groups > 1 else 0
    for key, scale, matrix in zip(keys, scales, networks, strict=True):
        signs = expand(key, matrix, in_features, steepness)
        if groups == 1:
            spread = scale
        else:
            spread = scale[:, :, None].expand(-1, -1, group_size).flatten(1)[:, : in_features if pad else None]
        total = signs * spread if total is None else torch.addcmul(total, signs, spread)
    assert total is not None
    return total
