"""Decoding in one native call per token, where all blocks are binary-coded and served by tables on a CPU.

Norms, rotations, attention and SwiGLU between the products cost torch some ten calls each, which for one token is most
of its time. Prompts, adapters and the output matrix stay in torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from hcx.generate.cache import CacheView
from hcx.generate.step import EagerSteps, Steps
from hcx.kernels.decode import NativeDecoder, StepBranch, StepShape
from hcx.model.cache import KVCache
from hcx.model.decoder import MLP, Attention, Decoder
from hcx.model.parts.base import Parts
from hcx.model.parts.linear import LinearPart
from hcx.model.parts.sources import BCQSource, TableProduct
from hcx.model.rope import rotary_tables


def best_steps(decoder: Decoder) -> Steps:
    """The native steps where they serve this decoder, or plain torch."""
    return EagerSteps(decoder) if why_not_native(decoder) else NativeSteps(decoder)


def why_not_native(decoder: Decoder) -> str | None:
    """Why the native step does not serve a decoder; None if it does."""
    if type(decoder.parts) is not Parts or decoder.embedding is None or decoder.norm is None:
        return "the decoder is a part of a model"
    weight = decoder.embedding.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"activations are {weight.dtype} on {weight.device}; fp32 on the CPU is served"
    products = [_product(part) for part in _linears(decoder)]
    if not products or any(product is None for product in products):
        return "a linear layer is not binary-coded, has adapters, or is not multiplied by tables"
    if len({product.method for product in products if product is not None}) > 1:
        return "linear layers ask for different numerics"
    return None


def _linears(decoder: Decoder) -> list[LinearPart]:
    return list(dict.fromkeys(decoder.linears().values()))


def _product(part: LinearPart) -> TableProduct | None:
    return part.source.table_product() if isinstance(part.source, BCQSource) else None


class NativeSteps(EagerSteps):
    """The steps of `EagerSteps`, with the blocks of a decoded token in one native call.

    Args:
        decoder: one that `why_not_native` has nothing against; its weights must not change afterwards.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        config, products = decoder.config, {part: _product(part) for part in _linears(decoder)}
        assert decoder.norm is not None
        branches = []
        for sublayer in cast("Iterable[Attention | MLP]", decoder.sublayers):
            if isinstance(sublayer, Attention):
                inner, outer = products[sublayer.qkv], products[sublayer.out]
            else:
                inner, outer = products[sublayer.gate_up], products[sublayer.down]
            assert inner is not None
            assert outer is not None
            post = None if sublayer.post_norm is None else sublayer.post_norm.weight.detach()
            branches.append(StepBranch(sublayer.norm.weight.detach(), post, inner.weights, outer.weights[0]))
            method = inner.method
        shape = StepShape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_size,
            eps=config.norm_eps,
            attention_scale=config.attention_scale,
            residual_multiplier=config.residual_multiplier,
        )
        self._native = NativeDecoder(shape, branches, decoder.norm.weight.detach(), method)
        self._tables: tuple[tuple[int, float], Tensor, Tensor] | None = None

    @torch.inference_mode()
    def decode_step(
        self, tokens: Tensor, positions: Tensor, cache: KVCache, adapter_ids: Tensor | None = None
    ) -> Tensor:
        """See `Steps.decode_step`."""
        if adapter_ids is not None or not isinstance(cache, CacheView):
            return super().decode_step(tokens, positions, cache, adapter_ids)
        hidden = self.decoder.embed(tokens[:, None])[0]
        cosines, sines = self._rotary(cache.keys.shape[2])
        self._native.step(hidden, positions.contiguous(), cache.keys, cache.values, cosines, sines)
        return self.logits(hidden)

    def _rotary(self, places: int) -> tuple[Tensor, Tensor]:
        """Tables of all positions of a cache, `[places, head_dim / 2]`."""
        key = (places, self.decoder.config.rope_theta)
        if self._tables is None or self._tables[0] != key:
            like = self.decoder.output_weight()
            tables = rotary_tables(self.decoder.config, None, places, like)
            half = self.decoder.config.head_size // 2
            cosines, sines = (table[:, 0, 0, :half].contiguous() for table in tables)
            self._tables = (key, cosines, sines)
        return self._tables[1], self._tables[2]
