"""Everything a forward pass needs besides the tokens, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hcx.model.cache import KVCache


@dataclass(frozen=True)
class ForwardMeta:
    """Travels beside the hidden states through every sublayer, and through activation checkpointing as an argument.

    Attributes:
        positions: rotary positions `[batch, seq]` (int64). None: `0..seq-1` in every row.
        document_ids: `[batch, seq]` (int64), equal for tokens of one document; attention never crosses a boundary.
            Documents are contiguous. None: a row is one document.
        kv_cache: keys and values of earlier tokens (generation). Excludes `document_ids`.
        dropbp_mask: one bool per residual sublayer of the whole model (attention of block 0, MLP of block 0, ...);
            True: this sublayer's backward is dropped (Woo et al., DropBP, section 3). None: nothing is dropped.
            Indices are global, also on a pipeline stage. It is decided before the forward, never drawn inside it.
        adapter_ids: `[batch]` (int64), which task's scales each row uses, counted from 1; 0: the base model's. None:
            all rows the base model's.
    """

    positions: Tensor | None = None
    document_ids: Tensor | None = None
    kv_cache: KVCache | None = None
    dropbp_mask: tuple[bool, ...] | None = None
    adapter_ids: Tensor | None = None
