"""Linear parts: one local matrix for one or several stems, split over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from hcx.errors import ConfigError
from hcx.model.naming import CanonicalSlice, ParameterMap
from hcx.model.parts.base import Parts
from hcx.model.parts.sources import DenseSource, LinearBlock, WeightSource


class LinearPart(nn.Module):
    """`y = x W^T` for fused stems, column-parallel (outputs split) or row-parallel (inputs split).

    Args:
        parts: sizes and region operations.
        stems: canonical stem -> global (out, in), in row order of the fused matrix.
        split: `column`: each rank holds an equal part of every stem's rows; `row`: of the columns.

    Attributes:
        blocks: which rows of the local matrix hold which block of which canonical matrix.
        source: computes the local product; replaceable, and never communicates.
    """

    source: WeightSource

    def __init__(self, parts: Parts, stems: dict[str, tuple[int, int]], split: Literal["column", "row"]) -> None:
        super().__init__()
        self.parts = parts
        self.split = split
        self.blocks = _layout(parts, stems, split)
        rows = self.blocks[-1].rows[1]
        self.source = DenseSource(parts.parameter(rows, self.blocks[0].in_features), self.blocks)

    def forward(self, x: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        """`[seq, batch, in]` -> `[seq, batch, out]`, of this rank; `adapter_ids` `[batch]` as in `ForwardMeta`."""
        if self.split == "column":
            return self._multiply(self.parts.enter_column(x), adapter_ids)
        return self.parts.exit_row(self._multiply(x, adapter_ids))

    def _multiply(self, x: Tensor, adapter_ids: Tensor | None) -> Tensor:
        result: Tensor = self.source(x) if adapter_ids is None else self.source.routed(x, adapter_ids)
        return result

    def replace_source(self, source: WeightSource) -> None:
        """Puts another source in place; its parameters replace the old one's."""
        self.source = source

    def parameter_map(self) -> ParameterMap:
        """Canonical slices of the source's parameters, by local name."""
        return {f"source.{name}": slices for name, slices in self.source.canonical().items()}


def _layout(parts: Parts, stems: dict[str, tuple[int, int]], split: str) -> tuple[LinearBlock, ...]:
    blocks, row = [], 0
    for stem, (out_features, in_features) in stems.items():
        divided = out_features if split == "column" else in_features
        if divided % parts.tp_size:
            raise ConfigError(f"{stem}: {divided} features cannot be split over tensor_parallel = {parts.tp_size}")
        share = divided // parts.tp_size
        local = (share, in_features) if split == "column" else (out_features, share)
        offset = (share * parts.tp_rank, 0) if split == "column" else (0, share * parts.tp_rank)
        blocks.append(
            LinearBlock(
                stem=stem,
                global_shape=(out_features, in_features),
                offset=offset,
                rows=(row, row + local[0]),
                in_features=local[1],
                split="column" if split == "column" else "row",
                tp_size=parts.tp_size,
            )
        )
        row += local[0]
    return tuple(blocks)


@dataclass(frozen=True)
class VectorName:
    """Names a replicated vector or a matrix that is split by rows."""

    name: str

    def whole(self, parameter: Tensor) -> tuple[CanonicalSlice, ...]:
        """The canonical slice of a replicated parameter."""
        return (CanonicalSlice(self.name, tuple(parameter.shape), (0,) * parameter.dim(), (0, parameter.shape[0])),)

    def rows(self, parameter: Tensor, parts: Parts) -> tuple[CanonicalSlice, ...]:
        """The canonical slice of a matrix whose rows are split evenly over tensor-parallel ranks."""
        rows = parameter.shape[0]
        shape = (rows * parts.tp_size, *parameter.shape[1:])
        offset = (rows * parts.tp_rank, *(0,) * (parameter.dim() - 1))
        return (CanonicalSlice(self.name, shape, offset, (0, rows)),)
