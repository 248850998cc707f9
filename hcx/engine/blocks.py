"""Canonical tensors out of what sharded engines hold: blocks of rows, and flat ranges of them.

A rank holds local parameters. Each row range of one is a block of a canonical tensor (`ParameterMap`), and a sharding
optimizer holds only a flat range of the local parameter. `BlockMap` knows who holds what over a group of ranks, so
that one piece of code gathers, scatters and slices weights, optimizer state and gradients for every engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hcx.engine.base import StateSlice
from hcx.model.naming import CanonicalSlice, ParameterMap

Fragment = Callable[[str], Tensor]
"""Local parameter name -> the 1-D tensor of the flat range that this rank holds of it."""


@dataclass(frozen=True)
class _Piece:
    """A flat range of one block, held by this rank.

    Attributes:
        parameter: local parameter name.
        canonical: which block.
        shape: shape of the block.
        block_range: the part of the flattened block.
        fragment_range: the same part, within this rank's fragment of the local parameter.
    """

    parameter: str
    canonical: CanonicalSlice
    shape: tuple[int, ...]
    block_range: tuple[int, int]
    fragment_range: tuple[int, int]

    @property
    def key(self) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        return self.canonical.name, self.canonical.offset, self.block_range

    @property
    def is_whole_block(self) -> bool:
        return self.block_range == (0, _numel(self.shape))

    def block_of(self, full: Tensor) -> Tensor:
        """The block as a view of the canonical tensor."""
        for dim, (start, size) in enumerate(zip(self.canonical.offset, self.shape, strict=True)):
            full = full.narrow(dim, start, size)
        return full


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class BlockMap:
    """Who holds which part of which canonical tensor.

    Args:
        parameters: the blocks of every local parameter of this rank.
        shapes: shape of every local parameter.
        ranges: `(start, stop)` of the flattened local parameter that this rank holds; missing: nothing; the whole
            parameter where `ranges` is None.
        group: the ranks that together hold every canonical tensor; None: this rank alone does.
        device: where gathered tensors are built.

    Building one and `gather` are collective over `group`; the rest is local.
    """

    def __init__(
        self,
        parameters: ParameterMap,
        shapes: Mapping[str, tuple[int, ...]],
        ranges: Mapping[str, tuple[int, int]] | None,
        group: ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self._device = device
        self._pieces: dict[str, list[_Piece]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for parameter, blocks in parameters.items():
            for block in blocks:
                self._shapes[block.name] = block.global_shape
                held = (0, _numel(shapes[parameter])) if ranges is None else ranges.get(parameter)
                piece = None if held is None else _intersect(parameter, shapes[parameter], block, held)
                if piece is not None:
                    self._pieces.setdefault(block.name, []).append(piece)
        self._owned = self._exchange()

    def _exchange(self) -> set[tuple[str, tuple[int, ...], tuple[int, int]]]:
        """Learns every name of the group, and which pieces this rank answers for (replicas: the first holder)."""
        mine = [piece.key for pieces in self._pieces.values() for piece in pieces]
        if self._group is None:
            self._check_cover(mine)
            return set(mine)
        everyone: list[tuple[dict[str, tuple[int, ...]], list]] = [None] * self._group.size()  # type: ignore[list-item]
        torch.distributed.all_gather_object(everyone, (self._shapes, mine), group=self._group)
        merged: dict[str, tuple[int, ...]] = {}
        owners: dict[tuple, int] = {}
        for rank, (shapes, keys) in enumerate(everyone):
            merged.update(shapes)
            for key in keys:
                owners.setdefault(key, rank)
        self._shapes = merged
        self._check_cover(owners)
        return {key for key in mine if owners[key] == self._group.rank()}

    def _check_cover(self, owned: Iterable[tuple[str, tuple[int, ...], tuple[int, int]]]) -> None:
        """Every element has one owner: a gap or an overlap would be silent in every gather."""
        covered: dict[str, int] = dict.fromkeys(self._shapes, 0)
        for name, _, (start, stop) in owned:
            covered[name] += stop - start
        for name, shape in self._shapes.items():
            if covered[name] != _numel(shape):
                raise ValueError(f"{name}: ranks own {covered[name]} of {_numel(shape)} elements")

    @property
    def names(self) -> list[str]:
        """Canonical names of the group, in an order that is equal on every rank."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a canonical tensor."""
        return self._shapes[name]

    def holders(self, name: str) -> list[str]:
        """This rank's local parameters that hold a part of a canonical tensor; may be empty."""
        return list(dict.fromkeys(piece.parameter for piece in self._pieces.get(name, ())))

    def gather(self, name: str, fragment: Fragment) -> Tensor:
        """The full canonical tensor, fp32, on every rank of the group."""
        full = torch.zeros(self._shapes[name], dtype=torch.float32, device=self._device)
        for piece in self._pieces.get(name, ()):
            if piece.key not in self._owned:
                continue
            values = fragment(piece.parameter)[slice(*piece.fragment_range)].detach().float()
            block = piece.block_of(full)
            if piece.is_whole_block:
                block.copy_(values.view(piece.shape))
            else:
                part = block.clone().flatten()
                part[slice(*piece.block_range)] = values
                block.copy_(part.view(piece.shape))
        if self._group is not None:
            # Every element has one owner, so that the sum adds zeros to it: exact.
            torch.distributed.all_reduce(full, group=self._group)
        return full

    @torch.no_grad()
    def scatter(self, name: str, full: Tensor, fragment: Fragment, only: str | None = None) -> None:
        """Writes this rank's pieces of a full canonical tensor into its fragments (of one local parameter: `only`)."""
        for piece in self._pieces.get(name, ()):
            if only is not None and piece.parameter != only:
                continue
            values = piece.block_of(full).flatten()[slice(*piece.block_range)]
            fragment(piece.parameter)[slice(*piece.fragment_range)].copy_(values)

    def slices(self, name: str, key: str, fragment: Fragment) -> Iterator[StateSlice]:
        """This rank's part of a canonical tensor; over the group every element comes once."""
        for piece in self._pieces.get(name, ()):
            if piece.key not in self._owned:
                continue
            values = fragment(piece.parameter)[slice(*piece.fragment_range)].detach().float()
            yield StateSlice(
                name=name,
                key=key,
                global_shape=self._shapes[name],
                offset=piece.canonical.offset,
                shape=piece.shape,
                tensor=values.view(piece.shape) if piece.is_whole_block else values,
                flat_range=None if piece.is_whole_block else piece.block_range,
            )


def _intersect(parameter: str, shape: tuple[int, ...], block: CanonicalSlice, held: tuple[int, int]) -> _Piece | None:
    per_row = _numel(tuple(shape[1:]))
    begin, end = block.rows[0] * per_row, block.rows[1] * per_row
    low, high = max(begin, held[0]), min(end, held[1])
    if low >= high:
        return None
    return _Piece(
        parameter=parameter,
        canonical=block,
        shape=(block.rows[1] - block.rows[0], *shape[1:]),
        block_range=(low - begin, high - begin),
        fragment_range=(low - held[0], high - held[0]),
    )
