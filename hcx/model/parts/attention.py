"""The attention core: causal, grouped queries, packed documents, and cached keys."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hcx.model.meta import ForwardMeta


def attend(q: Tensor, k: Tensor, v: Tensor, meta: ForwardMeta, layer: int, scale: float) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: `[seq, batch, heads, head_dim]`, rotated.
        k, v: `[seq, batch, kv_heads, head_dim]`, k rotated.
        meta: document bounds or the cache.
        layer: global block number (the cache's index).
        scale: factor of the scores.

    Returns:
        `[seq, batch, heads * head_dim]`.
    """
    seq, batch, heads, _ = q.shape
    queries = q.permute(1, 2, 0, 3)
    if meta.kv_cache is not None:
        if meta.positions is None:
            raise ValueError("a forward with a cache needs positions")
        meta.kv_cache.append(layer, k.transpose(0, 1), v.transpose(0, 1), meta.positions)
        keys, values = meta.kv_cache.gather(layer)  # [batch, capacity, kv_heads, head_dim]
        # A key lies at the index of its position, so a query sees the indices up to its own position.
        visible = torch.arange(keys.shape[1], device=q.device) <= meta.positions[:, :, None]
        out = F.scaled_dot_product_attention(
            queries,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=visible[:, None],
            scale=scale,
            enable_gqa=heads != keys.shape[2],
        )
    else:
        keys, values = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
        gqa = heads != k.shape[2]
        if meta.document_ids is None:
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=gqa)
        elif q.is_cuda:
            out = _flex(queries, keys, values, meta.document_ids, scale, gqa)
        else:
            out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=_document_mask(meta.document_ids), scale=scale, enable_gqa=gqa
            )
    return out.permute(2, 0, 1, 3).reshape(seq, batch, -1)


class _LastMask:
    """Every layer of a forward asks for the same mask: the last one is kept."""

    ids: Tensor | None = None
    mask: Tensor | None = None


def _document_mask(document_ids: Tensor) -> Tensor:
    """`[batch, 1, seq, seq]` bool, True where attention is allowed. CPU only: on a GPU it would be materialised."""
    if _LastMask.ids is not document_ids or _LastMask.mask is None:
        same = document_ids[:, :, None] == document_ids[:, None, :]
        _LastMask.ids, _LastMask.mask = document_ids, same.tril_()[:, None]
    return _LastMask.mask


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor, scale: float, gqa: bool) -> Tensor:
    """Block-sparse attention within documents (flex attention). Written for CUDA; not yet run on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    def within_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    batch, seq = document_ids.shape
    mask = create_block_mask(within_document, batch, None, seq, seq, device=q.device)
    result: Tensor = _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa)
    return result
