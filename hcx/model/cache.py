"""The protocol of a key-value cache: block tables from the first day, static shapes, no host synchronisation."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class KVCache(Protocol):
    """Keys and values of earlier tokens for a batch of sequences.

    Storage is in blocks; `block_tables` maps a row's logical blocks to storage. A contiguous cache is the case of one
    block per row. A key lies at the logical index equal to its position.

    Attributes:
        block_tables: `[batch, max_blocks]` int64, storage block of each logical block of a row.
        block_size: tokens per block.
    """

    block_tables: Tensor
    block_size: int

    def append(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Stores keys and values `[batch, seq, kv_heads, head_dim]` at `positions` `[batch, seq]`."""
        ...

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, capacity, kv_heads, head_dim]` in order of position; unset places are arbitrary
        but finite."""
        ...
