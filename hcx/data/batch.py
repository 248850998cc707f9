"""One micro-batch of packed text, as the loader makes it and the engines take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows of packed documents.

    Attributes:
        tokens: `[batch, seq]` int64, the inputs.
        labels: `[batch, seq]` int64, the token that follows each input. A position without a target holds a valid id
            and weight 0 (vocabulary-parallel losses know no ignore index).
        weights: `[batch, seq]` float32, how much each target counts in the loss.
        positions: `[batch, seq]` int64, restarting at 0 in each document.
        document_ids: `[batch, seq]` int64, 0, 1, ... within the row; None: each row is one document.
        sample_ids: global sample numbers of the rows (the ledger records them).
        sources: the data source (language) of each row, for the shares.
    """

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    document_ids: Tensor | None = None
    sample_ids: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on a device."""
        return MicroBatch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            document_ids=None if self.document_ids is None else self.document_ids.to(device, non_blocking=True),
            sample_ids=self.sample_ids,
            sources=self.sources,
        )

    def heaviest(self, rows: int) -> MicroBatch:
        """The `rows` rows with the most target weight, in their order; the earlier of equal ones."""
        ranked = sorted(range(self.tokens.shape[0]), key=lambda row: -float(self.weights[row].sum()))
        return self.select(sorted(ranked[:rows]))

    def select(self, rows: Sequence[int]) -> MicroBatch:
        """Some of the rows, by their numbers, in the order given."""
        kept = list(rows)
        return MicroBatch(
            tokens=self.tokens[kept],
            labels=self.labels[kept],
            weights=self.weights[kept],
            positions=self.positions[kept],
            document_ids=None if self.document_ids is None else self.document_ids[kept],
            sample_ids=tuple(self.sample_ids[row] for row in kept) if self.sample_ids else (),
            sources=tuple(self.sources[row] for row in kept) if self.sources else (),
        )
