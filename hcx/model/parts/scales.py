"""Binary codes whose scales are trained or differ by request, with planes that all tasks share (AlphaTuning).

Kwon et al. 2022 (Findings of EMNLP, arXiv 2210.03858): `W = sum_i alpha_i B_i` with frozen `B`; a task is its own
`alpha_1`. The gradient is that of autograd through the dense weight, without keeping a dense weight or `B x`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hcx.errors import ConfigError
from hcx.kernels import PackedWeight, Spec, select
from hcx.kernels.format import pack_signs
from hcx.model.naming import CanonicalSlice, ParameterMap
from hcx.model.parts.sources import BCQSource, LinearBlock, WeightSource, work_dtype

TrainedScales = Literal["first", "all", "offset", "first_and_offset"]


def trained_names(train: TrainedScales, bits: int) -> tuple[str, ...]:
    """What is trained of a weight: `scales.I` of plane `I`, `offset`."""
    planes = {"first": [0], "first_and_offset": [0], "all": range(bits), "offset": []}[train]
    names = [f"scales.{plane}" for plane in planes]
    return (*names, "offset") if train in ("offset", "first_and_offset") else tuple(names)


def local_packed(packed: PackedWeight, block: LinearBlock) -> PackedWeight:
    """The part of a packed weight that a tensor-parallel rank holds.

    Raises:
        ConfigError: a group of inputs would be split, and is not a whole row.
    """
    rows = slice(block.offset[0], block.offset[0] + block.out_features)
    first, stop = block.offset[1], block.offset[1] + block.in_features
    planes, scales = packed.planes[:, rows], packed.scales[:, rows]
    offset = None if packed.offset is None else packed.offset[rows]
    if block.in_features == packed.in_features:
        return replace(packed, planes=planes.contiguous(), scales=scales.contiguous(), offset=offset)
    group = packed.group_size
    if packed.num_groups > 1:
        if block.in_features % group:
            raise ConfigError(
                f"{block.stem}: groups of {group} inputs do not divide the {block.in_features} inputs that one of "
                f"engine.tensor_parallel = {block.tp_size} ranks holds; compress with a group_size that does, or with "
                "whole rows, or use engine.tensor_parallel = 1"
            )
        groups = slice(first // group, stop // group)
        scales, offset = scales[:, :, groups], None if offset is None else offset[:, groups]
    else:
        # A scale of a whole row multiplies every rank's share of the row alike.
        group = min(group, block.in_features)
    return replace(
        packed,
        planes=pack_signs(packed.signs()[:, rows, first:stop] > 0),
        scales=scales.contiguous(),
        offset=None if offset is None else offset.contiguous(),
        in_features=block.in_features,
        group_size=group,
    )


class _ScaledProduct(torch.autograd.Function):
    """`x W^T`; backward makes the dense weight again (dX = dY W, dalpha = sums of dY^T X over B)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: ScaledSource, *trained: Tensor) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(x, *trained)
        return F.linear(x, source.dense(trained, work_dtype(x)).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *trained = ctx.saved_tensors
        source, work = ctx.source, work_dtype(x)
        back = grad @ source.dense(trained, work).to(x.dtype) if ctx.needs_input_grad[0] else None
        # Summed over tokens in full precision: the many small terms vanish in bf16.
        outer = grad.to(work).flatten(0, -2).t() @ x.to(work).flatten(0, -2)
        return back, None, *(value.to(t.dtype) for value, t in zip(source.reduce(outer), trained, strict=True))


class ScaledSource(WeightSource):
    """One binary-coded weight with trained scales.

    Args:
        packed: the rank's part.
        block: which part, the only one of its matrix.
        group_size, num_groups: of the whole weight.
        train: which scales are parameters; the others, and the planes, are data.
        divide: divide their gradients by the group size, as the paper does.
    """

    def __init__(
        self,
        packed: PackedWeight,
        block: LinearBlock,
        group_size: int,
        num_groups: int,
        train: TrainedScales = "first",
        divide: bool = True,
    ) -> None:
        super().__init__()
        self.packed, self.block = packed, block
        self.names = trained_names(train, packed.bits)
        self._divisor = float(min(group_size, block.global_shape[1])) if divide else 1.0
        self._global = (block.global_shape[0], num_groups)
        self._first_group = 0 if num_groups == packed.num_groups else block.offset[1] // group_size
        shared = block.split == "row" and block.tp_size > 1 and num_groups == 1
        for name in self.names:
            if name == "offset":
                values = packed.offset if packed.offset is not None else torch.zeros_like(packed.scales[0].float())
            else:
                values = packed.scales[int(name.rpartition(".")[2])]
            parameter = nn.Parameter(values.detach().float().clone())
            # Every rank's share of the row contributes to the gradient of the row's one scale.
            parameter.tp_partial_gradient = shared  # type: ignore[attr-defined]
            self.register_parameter(name.replace(".", "_"), parameter)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _ScaledProduct.apply(x, self, *self.trained())
        return result

    def trained(self) -> list[Tensor]:
        """The parameters, in the order of `names`."""
        return [self.get_parameter(name.replace(".", "_")) for name in self.names]

    def dense(self, trained: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`[out, in]`, summed in the order of `PackedWeight.dequantize`: unchanged scales give the same bits."""
        packed, values = self.packed, dict(zip(self.names, trained, strict=True))
        total: Tensor | None = None
        signs = self._grouped(packed.signs(dtype))
        for plane in range(packed.bits):
            scale = values.get(f"scales.{plane}", packed.scales[plane]).detach().to(dtype)[:, :, None]
            total = signs[plane] * scale if total is None else total.addcmul_(signs[plane], scale)
        assert total is not None
        offset = values.get("offset", packed.offset)
        if offset is not None:
            total += offset.detach().to(dtype)[:, :, None]
        return total.flatten(1)[:, : packed.in_features]

    def reduce(self, outer: Tensor) -> list[Tensor]:
        """The gradients of the parameters from dY^T X `[out, in]`."""
        grouped = self._grouped(outer)
        signs = self._grouped(self.packed.signs(outer.dtype))
        found = []
        for name in self.names:
            part = grouped if name == "offset" else grouped * signs[int(name.rpartition(".")[2])]
            found.append(part.sum(-1) / self._divisor)
        return found

    def _grouped(self, values: Tensor) -> Tensor:
        """`[..., in]` -> `[..., groups, group]`; the padding of a short group is 0 and adds nothing to any sum."""
        packed = self.packed
        pad = packed.num_groups * packed.group_size - packed.in_features
        values = F.pad(values, (0, pad)) if pad else values
        return values.unflatten(-1, (packed.num_groups, packed.group_size))

    def canonical(self) -> ParameterMap:
        return {
            name.replace(".", "_"): (
                CanonicalSlice(
                    f"{self.block.stem}.{name}",
                    self._global,
                    (self.block.offset[0], self._first_group),
                    (0, self.block.out_features),
                ),
            )
            for name in self.names
        }


class RoutedSource(WeightSource):
    """Several tasks over the same planes: every row of a batch is multiplied with its own task's scales.

    Rows with one scale per row of the weight (groups of whole rows): the planes are stacked as the rows of one 1-bit
    weight, multiplied once for all tasks, and each token's scales are applied to the result: `y = sum_i alpha_i * (B_i
    x)`. Smaller groups: the scales lie inside the sum, so each task has its own prepacked weight.

    Args:
        base: the model without a task.
        plain: the base's weights, in row order of the fused matrix.
        tasks: the same with each task's scales; task `k` is number `k + 1`, the base is 0.
    """

    def __init__(self, base: BCQSource, plain: Sequence[PackedWeight], tasks: Sequence[Sequence[PackedWeight]]) -> None:
        super().__init__()
        self.base = base
        self._shared: list[_StackedPlanes] = []
        self._own: list[BCQSource] = []
        if all(weight.num_groups == 1 for weight in plain):
            versions = [plain, *tasks]
            self._shared = [
                _StackedPlanes([version[number] for version in versions], base.numerics) for number in range(len(plain))
            ]
        else:
            self._own = [BCQSource(dict(zip(base.stems, task, strict=True)), base.numerics) for task in tasks]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)

    def routed(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """See `WeightSource.routed`."""
        if self._shared:
            return torch.cat([stack(x, adapter_ids) for stack in self._shared], dim=-1)
        numbers = adapter_ids.tolist()
        sources: list[WeightSource] = [self.base, *self._own]
        if len(set(numbers)) == 1:
            result: Tensor = sources[numbers[0]](x)
            return result
        parts = torch.empty(0)
        for number in sorted(set(numbers)):
            rows = torch.tensor([row for row, other in enumerate(numbers) if other == number], device=x.device)
            found = sources[number](x.index_select(1, rows))
            if not parts.numel():
                parts = found.new_empty(*x.shape[:-1], found.shape[-1])
            parts.index_copy_(1, rows, found)
        return parts

    def canonical(self) -> ParameterMap:
        return {}


class _StackedPlanes:
    """The planes of one weight as the rows of a 1-bit weight, and the scales of every task."""

    def __init__(self, versions: Sequence[PackedWeight], numerics: str) -> None:
        first = versions[0]
        bits, rows = first.bits, first.out_features
        stacked = PackedWeight(
            planes=first.planes.reshape(1, bits * rows, -1).contiguous(),
            scales=torch.ones(1, bits * rows, 1, device=first.planes.device),
            offset=None,
            in_features=first.in_features,
            group_size=first.group_size,
        )
        self._backend = select(Spec.of(stacked, numerics=numerics))
        self._weight = self._backend.prepack(stacked)
        self._scales = torch.stack([version.scales[:, :, 0].float() for version in versions])
        self._offsets: Tensor | None = None
        if any(version.offset is not None for version in versions):
            zero = torch.zeros(rows, device=first.planes.device)
            self._offsets = torch.stack([zero if v.offset is None else v.offset[:, 0] for v in versions])

    def __call__(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """`[seq, batch, in]`, `[batch]` -> `[seq, batch, out]`."""
        ids = adapter_ids.to(x.device)
        scales = self._scales[ids]  # [batch, q, out]
        products = self._backend.matmul(x.float(), self._weight).unflatten(-1, scales.shape[1:])
        result = (products * scales).sum(-2)
        if self._offsets is not None:
            result += x.float().sum(-1, keepdim=True) * self._offsets[ids]
        return result.to(x.dtype)
