"""The two forwards of generation: reading a prompt, and one token for every running request."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hcx.model.cache import KVCache
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta


class Steps(Protocol):
    """What the scheduler computes with; a native step or a captured graph replaces this."""

    def decode_step(
        self, tokens: Tensor, positions: Tensor, cache: KVCache, adapter_ids: Tensor | None = None
    ) -> Tensor:
        """One token for each row.

        Shapes depend on the arguments' shapes only, and nothing waits for the device.

        Args:
            tokens: `[batch]` int64, the newest token of each row.
            positions: `[batch]` int64, its position.
            cache: holds everything before it; gets its keys and values.
            adapter_ids: `[batch]` int64, or None for the base model.

        Returns:
            Logits `[batch, vocab]` fp32.
        """
        ...

    def prefill(self, tokens: Tensor, positions: Tensor, cache: KVCache, adapter_ids: Tensor | None = None) -> Tensor:
        """Part of each row's prompt: tokens and positions `[batch, seq]` -> final hidden states `[seq, batch, hidden]`.

        Padding tokens carry the cache's scratch position.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[n, hidden]` -> logits `[n, vocab]` fp32."""
        ...


class EagerSteps:
    """The steps in plain torch, on a decoder that holds all stages."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @torch.inference_mode()
    def decode_step(
        self, tokens: Tensor, positions: Tensor, cache: KVCache, adapter_ids: Tensor | None = None
    ) -> Tensor:
        """See `Steps.decode_step`."""
        meta = ForwardMeta(positions=positions[:, None], kv_cache=cache, adapter_ids=adapter_ids)
        return self.logits(self.decoder(tokens[:, None], meta)[0])

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, positions: Tensor, cache: KVCache, adapter_ids: Tensor | None = None) -> Tensor:
        """See `Steps.prefill`."""
        hidden: Tensor = self.decoder(tokens, ForwardMeta(positions, kv_cache=cache, adapter_ids=adapter_ids))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Steps.logits`."""
        return self.decoder.output(hidden[None]).logits()[:, 0]
