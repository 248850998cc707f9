"""Weight sources: what a linear part multiplies with. A source sees local blocks only and never communicates.

So quantized and adapted layers keep their tensor parallelism: the part around the source owns the communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hcx.dist import derived_generator
from hcx.kernels import PackedWeight, Spec, select
from hcx.kernels.cpu import TableBackend
from hcx.kernels.native import NativeWeight
from hcx.model.naming import CanonicalSlice, ParameterMap


def work_dtype(x: Tensor) -> torch.dtype:
    """What generated weights and sums over tokens are computed in: fp32 for reduced precision, fp64 in tests."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LinearBlock:
    """The rows of a local matrix that hold one stem's block.

    Attributes:
        stem: canonical module path, for example `model.layers.0.self_attn.q_proj`.
        global_shape: (out, in) of the whole canonical matrix.
        offset: where the local block begins in it.
        rows: rows of the local fused matrix.
        in_features: local columns.
        split: what tensor parallelism divides.
        tp_size: over how many ranks.
    """

    stem: str
    global_shape: tuple[int, int]
    offset: tuple[int, int]
    rows: tuple[int, int]
    in_features: int
    split: Literal["column", "row"]
    tp_size: int

    @property
    def out_features(self) -> int:
        """Local rows."""
        return self.rows[1] - self.rows[0]

    def alone(self) -> LinearBlock:
        """The same block as the only one of its matrix."""
        return replace(self, rows=(0, self.out_features))


class WeightSource(nn.Module):
    """Computes `x @ W^T` for the local blocks of one linear part."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., local in]` -> `[..., local out]`."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def routed(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """`forward` of `[seq, batch, in]`, where row `i` of the batch belongs to task `adapter_ids[i]`, 0 for none."""
        result: Tensor = self(x)  # the same for every task
        return result

    def canonical(self) -> ParameterMap:
        """Canonical slices of every parameter, by local name."""
        raise TypeError(f"{type(self).__name__} does not define canonical")


class DenseSource(WeightSource):
    """One dense matrix `[local out, local in]`."""

    def __init__(self, weight: nn.Parameter, blocks: Sequence[LinearBlock]) -> None:
        super().__init__()
        self.weight = weight
        self.blocks = tuple(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def canonical(self) -> ParameterMap:
        return {
            "weight": tuple(CanonicalSlice(f"{b.stem}.weight", b.global_shape, b.offset, b.rows) for b in self.blocks)
        }


class LoRASource(WeightSource):
    """A base source plus low-rank updates: `y = base(x) + (alpha / rank) * (x A^T) B^T` per stem (Hu et al. 2021).

    Args:
        base: the source below; its parameters are frozen here.
        blocks: the part's blocks.
        rank, alpha: as in PEFT.
        stems: which stems get an update; all if not given.
        seed: of A's initial values, a function of (seed, canonical name); B starts at zero.
    """

    def __init__(
        self,
        base: WeightSource,
        blocks: Sequence[LinearBlock],
        rank: int,
        alpha: float,
        stems: Sequence[str] | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.blocks = tuple(blocks)
        self.rank = rank
        self.scaling = alpha / rank
        first = next(base.parameters(), None)
        dtype = dtype or (first.dtype if first is not None and first.is_floating_point() else torch.float32)
        device = device or (first.device if first is not None else torch.device("cpu"))
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()
        for block in self.blocks:
            if stems is not None and block.stem not in stems:
                continue
            generator = derived_generator(seed, "lora_A", block.stem)
            # Uniform in +-1/sqrt(in): what PEFT's kaiming_uniform(a=sqrt(5)) amounts to.
            full = torch.rand(rank, block.global_shape[1], generator=generator).mul_(2).sub_(1)
            full = full / block.global_shape[1] ** 0.5
            local = full[:, block.offset[1] : block.offset[1] + block.in_features]
            key = _key(block.stem)
            self.lora_a[key] = nn.Parameter(local.to(dtype=dtype, device=device).contiguous())
            self.lora_b[key] = nn.Parameter(torch.zeros(block.out_features, rank, dtype=dtype, device=device))
            # Whichever factor is replicated over tensor-parallel ranks gets only its rank's part of the gradient.
            partial = self.lora_a[key] if block.split == "column" else self.lora_b[key]
            partial.tp_partial_gradient = block.tp_size > 1

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        updates = []
        for block in self.blocks:
            key = _key(block.stem)
            if key in self.lora_a:
                updates.append(F.linear(F.linear(x, self.lora_a[key]), self.lora_b[key]) * self.scaling)
            else:
                updates.append(x.new_zeros(*x.shape[:-1], block.out_features))
        return result + torch.cat(updates, dim=-1)

    def canonical(self) -> ParameterMap:
        names: ParameterMap = {f"base.{name}": slices for name, slices in self.base.canonical().items()}
        for block in self.blocks:
            key = _key(block.stem)
            if key not in self.lora_a:
                continue
            names[f"lora_a.{key}"] = (
                CanonicalSlice(
                    f"{block.stem}.lora_A.weight",
                    (self.rank, block.global_shape[1]),
                    (0, block.offset[1]),
                    (0, self.rank),
                ),
            )
            names[f"lora_b.{key}"] = (
                CanonicalSlice(
                    f"{block.stem}.lora_B.weight",
                    (block.global_shape[0], self.rank),
                    (block.offset[0], 0),
                    (0, block.out_features),
                ),
            )
        return names


class _PackedProduct(torch.autograd.Function):
    """`x W^T` with a packed `W`, differentiable in `x`.

    Autograd would keep the dequantized weight of every layer for the backward pass; here it is made again there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.weight = weight
        return multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return (grad.float() @ ctx.weight.dequantize(torch.float32)).to(grad.dtype), None, None


@dataclass(frozen=True)
class TableProduct:
    """What a source multiplies by in one call of the native tables.

    Attributes:
        method: of the tables, a key of `native.METHODS`.
        weights: in row order of the fused matrix.
    """

    method: str
    weights: tuple[NativeWeight, ...]


class BCQSource(WeightSource):
    """Binary-coded weights, one `PackedWeight` per stem, multiplied by a kernel of the requested numerics class.

    Args:
        packed: stem -> packed weight, in row order of the fused matrix.
        numerics: `reference`, `exact` or `fast`; the kernel is never below it.
        differentiable: keep the packed form too, for gradients of the input: low-rank updates can then be trained on
            top. The weights themselves are always frozen.
    """

    def __init__(
        self, packed: Mapping[str, PackedWeight], numerics: str = "reference", differentiable: bool = False
    ) -> None:
        super().__init__()
        self.stems = tuple(packed)
        self.numerics = numerics
        self._kept = tuple(packed.values()) if differentiable else ()
        self._backends = []
        self._weights = []
        for weight in packed.values():
            backend = select(Spec.of(weight, numerics=numerics))
            self._backends.append(backend)
            self._weights.append(backend.prepack(weight))

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the backends in use."""
        return tuple(backend.name for backend in self._backends)

    def table_product(self) -> TableProduct | None:
        """The product as the native tables do it in one call; None where another kernel, or more than one, serves."""
        first = self._backends[0]
        if not isinstance(first, TableBackend) or any(backend is not first for backend in self._backends):
            return None
        weights = tuple(weight for weight in self._weights if isinstance(weight, NativeWeight))
        if len({weight.group_size for weight in weights}) > 1:
            return None
        return TableProduct(first.method, weights)

    def forward(self, x: Tensor) -> Tensor:
        if self._kept and torch.is_grad_enabled() and x.requires_grad:
            return self._differentiable(x)
        first = self._backends[0]
        if len(self._weights) == 1:
            return first.matmul(x, self._weights[0])
        if all(backend is first for backend in self._backends):
            return first.matmul_shared(x, self._weights)
        outputs = [backend.matmul(x, weight) for backend, weight in zip(self._backends, self._weights, strict=True)]
        return torch.cat(outputs, dim=-1)

    def _differentiable(self, x: Tensor) -> Tensor:
        products = zip(self._kept, self._backends, self._weights, strict=True)
        outputs = [
            _PackedProduct.apply(x, weight, partial(backend.matmul, packed=prepacked))
            for weight, backend, prepacked in products
        ]
        return torch.cat(outputs, dim=-1)

    def canonical(self) -> ParameterMap:
        return {}  # planes and scales are frozen data, not parameters


class SplitSource(WeightSource):
    """One source per stem of a fused part, outputs concatenated."""

    def __init__(self, sources: Mapping[str, WeightSource]) -> None:
        super().__init__()
        self.sources = nn.ModuleDict({_key(stem): source for stem, source in sources.items()})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([source(x) for source in self.sources.values()], dim=-1)

    def routed(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """See `WeightSource.routed`."""
        sources = cast("Iterable[WeightSource]", self.sources.values())
        return torch.cat([source.routed(x, adapter_ids) for source in sources], dim=-1)

    def canonical(self) -> ParameterMap:
        return {
            f"sources.{key}.{name}": slices
            for key, source in self.sources.items()
            for name, slices in source.canonical().items()  # type: ignore[operator]
        }


def _key(stem: str) -> str:
    # Module names may not hold dots.
    return stem.replace(".", "__")
