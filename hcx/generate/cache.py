"""A key-value cache of fixed size whose rows are requests: contiguous storage, one block per row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hcx.errors import ConfigError
from hcx.model.config import ModelConfig

LENGTH_STEP = 64
"""Views grow by this many places, so that few distinct shapes occur."""


class ContiguousKVCache:
    """Storage for `rows` sequences of up to `max_seq` tokens, for every layer.

    A forward sees a part of it: `view(first, count, length)`. Each row has one place more than `max_seq`, the scratch
    place, where padding tokens are written and which no view shows.

    Args:
        config: shape of the model.
        rows: sequences held at a time.
        max_seq: tokens per sequence.
        dtype, device: of keys and values.

    Raises:
        ConfigError: there is not enough memory.

    Attributes:
        scratch: the position for padding tokens.
    """

    def __init__(
        self, config: ModelConfig, rows: int, max_seq: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.rows, self.max_seq, self.scratch = rows, max_seq, max_seq
        shape = (config.num_layers, rows, max_seq + 1, config.kv_heads, config.head_size)
        # Zeros, not empty: places that were never written take part in masked products and must be finite.
        try:
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError:  # torch's out-of-memory errors are of this kind
            size = 2 * math.prod(shape) * dtype.itemsize / 2**30
            raise ConfigError(
                f"a cache for {rows} requests of {max_seq} tokens needs {size:.1f} GiB, which {device} does not have; "
                "lower max_seq or max_batch"
            ) from None

    @property
    def size_bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def view(self, first: int, count: int, length: int) -> CacheView:
        """Rows `[first, first + count)`, of which queries see the first `length` places or a few more.

        Args:
            length: at least the largest position in use plus one; rounded up to `LENGTH_STEP`.
        """
        length = min(-(-length // LENGTH_STEP) * LENGTH_STEP, self.max_seq)
        return CacheView(self.keys[:, first : first + count], self.values[:, first : first + count], length)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` places of one row over another's."""
        for stored in (self.keys, self.values):
            stored[:, target, :length].copy_(stored[:, source, :length])

    def swap(self, left: int, right: int, length: int) -> None:
        """Exchanges the first `length` places of two rows."""
        for stored in (self.keys, self.values):
            kept = stored[:, left, :length].clone()
            stored[:, left, :length].copy_(stored[:, right, :length])
            stored[:, right, :length].copy_(kept)


@dataclass
class CacheView:
    """Neighbouring rows of a `ContiguousKVCache` as the `KVCache` of one forward.

    Attributes:
        keys, values: `[layers, batch, places, kv_heads, head_dim]`, shared with the cache.
        length: places that `gather` shows.
        block_size: places per row: a row is one block.
        block_tables: `[batch, 1]`: row i is block i.
    """

    keys: Tensor
    values: Tensor
    length: int

    def __post_init__(self) -> None:
        self.block_size = self.keys.shape[2]
        self.block_tables = torch.arange(self.keys.shape[1], device=self.keys.device)[:, None]

    def append(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Stores keys and values `[batch, seq, kv_heads, head_dim]` at `positions` `[batch, seq]`."""
        # One block per row: the block table is the row number, and a position is the place in its block.
        self.keys[layer].index_put_((self.block_tables, positions), keys.to(self.keys.dtype))
        self.values[layer].index_put_((self.block_tables, positions), values.to(self.values.dtype))

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, length, kv_heads, head_dim]`, without a copy."""
        return self.keys[layer, :, : self.length], self.values[layer, :, : self.length]
