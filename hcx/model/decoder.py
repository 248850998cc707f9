"""The one decoder: llama, and hyperclovax with its multipliers and Peri-LN, whole or one pipeline stage of it.

Unusual here: activations are `[seq, batch, hidden]` (sequence parallelism splits dim 0); the unit of everything is the
residual *sublayer* (attention or MLP), because DropBP drops those; q/k/v and gate/up are fused matrices with split
names in files; what is sharded, and how ranks communicate, is in `Parts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hcx.model.config import ModelConfig
from hcx.model.meta import ForwardMeta
from hcx.model.naming import ParameterMap
from hcx.model.parts.attention import attend
from hcx.model.parts.base import Parts
from hcx.model.parts.linear import LinearPart, VectorName
from hcx.model.parts.norm import rms_norm
from hcx.model.parts.sources import WeightSource
from hcx.model.rope import Rotary, rotary_tables, rotate


class Norm(nn.Module):
    """RMSNorm with a weight; statistics in fp32."""

    def __init__(self, parts: Parts, size: int, eps: float, name: str) -> None:
        super().__init__()
        self.weight = parts.parameter(size)
        self.weight.sequence_parallel = parts.sequence_parallel  # type: ignore[attr-defined] # megatron's convention
        self.eps = eps
        self.name = VectorName(name)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def parameter_map(self) -> ParameterMap:
        """Canonical slices by local name."""
        return {"weight": self.name.whole(self.weight)}


class Sublayer(nn.Module):
    """One residual branch `f`: norm, then attention or MLP, then (Peri-LN) a second norm.

    Attributes:
        index: its number in the whole model: `2 * layer` for attention, `2 * layer + 1` for the MLP.
    """

    def __init__(self, parts: Parts, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.layer = index // 2
        stem = f"model.layers.{self.layer}"
        is_attention = index % 2 == 0
        norm_name = "input_layernorm" if is_attention else "post_attention_layernorm"
        post_name = "post_norm1" if is_attention else "post_norm2"
        size, eps = config.hidden_size, config.norm_eps
        self.norm = Norm(parts, size, eps, f"{stem}.{norm_name}.weight")
        self.post_norm = Norm(parts, size, eps, f"{stem}.{post_name}.weight") if config.use_post_norm else None

    def branch(self, x: Tensor, meta: ForwardMeta, rotary: Rotary) -> Tensor:
        """The sublayer proper, between the norms."""
        raise TypeError(f"{type(self).__name__} does not define branch")

    def forward(self, x: Tensor, meta: ForwardMeta, rotary: Rotary) -> Tensor:
        y = self.branch(self.norm(x), meta, rotary)
        return y if self.post_norm is None else self.post_norm(y)


class Attention(Sublayer):
    """Grouped-query attention with rotary positions."""

    def __init__(self, parts: Parts, config: ModelConfig, index: int) -> None:
        super().__init__(parts, config, index)
        stem, dim = f"model.layers.{self.layer}.self_attn", config.head_size
        query, key, hidden = config.num_heads * dim, config.kv_heads * dim, config.hidden_size
        stems = {f"{stem}.q_proj": (query, hidden), f"{stem}.k_proj": (key, hidden), f"{stem}.v_proj": (key, hidden)}
        self.qkv = LinearPart(parts, stems, "column")
        self.out = LinearPart(parts, {f"{stem}.o_proj": (hidden, query)}, "row")
        self.heads = [query // dim // parts.tp_size, key // dim // parts.tp_size, key // dim // parts.tp_size]
        self.dim, self.scale = dim, config.attention_scale

    def branch(self, x: Tensor, meta: ForwardMeta, rotary: Rotary) -> Tensor:
        fused = self.qkv(x, meta.adapter_ids)
        heads = fused.unflatten(-1, (sum(self.heads), self.dim))
        queries, keys, _ = self.heads
        # Queries and keys lie side by side: one rotation turns both.
        turned, v = rotate(heads[:, :, : queries + keys], rotary), heads[:, :, queries + keys :]
        q, k = turned.split([queries, keys], dim=2)
        return self.out(attend(q, k, v, meta, self.layer, self.scale), meta.adapter_ids)


class MLP(Sublayer):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, parts: Parts, config: ModelConfig, index: int) -> None:
        super().__init__(parts, config, index)
        stem, hidden, inner = f"model.layers.{self.layer}.mlp", config.hidden_size, config.intermediate_size
        stems = {f"{stem}.gate_proj": (inner, hidden), f"{stem}.up_proj": (inner, hidden)}
        self.gate_up = LinearPart(parts, stems, "column")
        self.down = LinearPart(parts, {f"{stem}.down_proj": (hidden, inner)}, "row")

    def branch(self, x: Tensor, meta: ForwardMeta, rotary: Rotary) -> Tensor:
        gate, up = self.gate_up(x, meta.adapter_ids).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, meta.adapter_ids)


class Matrix(nn.Module):
    """The embedding or the output matrix, rows split over tensor-parallel ranks."""

    def __init__(self, parts: Parts, config: ModelConfig, name: str) -> None:
        super().__init__()
        self.parts = parts
        self.weight = parts.parameter(config.vocab_size // parts.tp_size, config.hidden_size)
        self.name = VectorName(name)

    def parameter_map(self) -> ParameterMap:
        """Canonical slices by local name."""
        return {"weight": self.name.rows(self.weight, self.parts)}


class Output:
    """What the last stage computed for one micro-batch (`ModelOutput`): logits only where they are asked for."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, parts: Parts, config: ModelConfig, source: WeightSource | None = None
    ) -> None:
        self.hidden = hidden
        self._weight, self._parts, self._config, self._source = weight, parts, config, source

    def logits(self) -> Tensor:
        """`[batch, seq, vocab]` fp32."""
        # One row of a batch has strides by which torch would multiply token by token, nine times as long.
        hidden = self._parts.enter_output(self.hidden).contiguous()
        product = F.linear(hidden, self._weight) if self._source is None else self._source(hidden)
        local = product.float() * self._config.logits_scaling
        return self._parts.gather_logits(local).transpose(0, 1)

    def token_logprobs(self, labels: Tensor) -> Tensor:
        """Log-probability of each label: `[batch, seq]` -> `[batch, seq]` fp32."""
        if self._source is not None:
            # Served, never trained: no gradient to save memory for.
            return torch.stack([self._row_logprobs(row, labels[row]) for row in range(labels.shape[0])])
        hidden = self._parts.enter_output(self.hidden)
        flat = self._parts.token_logprobs(
            hidden.flatten(0, 1), self._weight, labels.t().reshape(-1), self._config.logits_scaling
        )
        return flat.view(hidden.shape[0], hidden.shape[1]).t()

    def _row_logprobs(self, row: int, labels: Tensor) -> Tensor:
        alone = Output(self.hidden[:, row : row + 1], self._weight, self._parts, self._config, self._source)
        logits = alone.logits()[0]
        return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)

    def values(self) -> Tensor:
        """A scalar head's values; this decoder has no scalar head."""
        raise TypeError("this model has no scalar head")


class Decoder(nn.Module):
    """The decoder, or the stage of it that holds `layers`.

    Args:
        config: shape and options.
        parts: how the pieces are sharded.
        layers: global numbers of the blocks held here; all if not given.
        pre: holds the embedding. `forward` then takes tokens `[batch, seq]`, else hidden `[seq, batch, hidden]`.
        post: holds the final norm and the output.

    Attributes:
        activation_checkpointing: kept sublayers are computed again in the backward pass.
        drop_mechanism: how DropBP drops a branch: without a graph, or with one that is thrown away.
        output_source: multiplies with the output matrix where that is binary-coded and served by a kernel; the dense
            matrix is then only read for tokens' embeddings (if it is tied) and for its type.
    """

    def __init__(
        self, config: ModelConfig, parts: Parts, layers: range | None = None, pre: bool = True, post: bool = True
    ) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        self.activation_checkpointing = False
        self.drop_mechanism: Literal["no_grad", "detach"] = "no_grad"
        self.layers = range(config.num_layers) if layers is None else layers
        self.embedding = Matrix(parts, config, "model.embed_tokens.weight") if pre else None
        kinds = (Attention, MLP)
        self.sublayers = nn.ModuleList(
            kinds[index % 2](parts, config, index) for layer in self.layers for index in (2 * layer, 2 * layer + 1)
        )
        self.norm = Norm(parts, config.hidden_size, config.norm_eps, "model.norm.weight") if post else None
        self.output_source: WeightSource | None = None
        self.head: Matrix | None = None
        if post and not (pre and config.tie_embeddings):
            # Tied across stages: a copy of the embedding on the last stage, under the embedding's name.
            self.head = Matrix(
                parts, config, "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
            )

    def forward(self, inputs: Tensor, meta: ForwardMeta) -> Tensor:
        """Tokens (first stage) or hidden states -> hidden states, after the final norm on the last stage."""
        hidden = inputs
        if self.embedding is not None:
            hidden = self.embed(inputs)
        rotary = rotary_tables(self.config, meta.positions, self.parts.sequence_length(hidden), hidden)
        for sublayer in cast("Iterable[Sublayer]", self.sublayers):
            branch = self._branch(sublayer, hidden, meta, rotary)
            if self.config.residual_multiplier != 1.0:
                branch = branch * self.config.residual_multiplier
            hidden = hidden + branch
        return hidden if self.norm is None else self.norm(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters the first block: tokens `[batch, seq]` -> `[seq, batch, hidden]`."""
        if self.embedding is None:
            raise ValueError("this stage has no embedding")
        hidden = self.parts.embed(tokens, self.embedding.weight)
        multiplier = self.config.embedding_multiplier
        return hidden * multiplier if multiplier != 1.0 else hidden

    def set_rope_theta(self, theta: float) -> None:
        """Another base of the rotary embedding from the next forward on; weights stay as they are."""
        self.config = self.config.model_copy(update={"rope_theta": theta})

    def _branch(self, sublayer: Sublayer, hidden: Tensor, meta: ForwardMeta, rotary: Rotary) -> Tensor:
        # DropBP (Woo et al. 2024): the forward is always whole; a dropped branch is a constant to the backward. Without
        # a graph nothing of it is stored and nothing is recomputed, so it is never put under checkpointing.
        dropped = meta.dropbp_mask is not None and meta.dropbp_mask[sublayer.index]
        if dropped and self.drop_mechanism == "no_grad":
            with torch.no_grad():
                return sublayer(hidden, meta, rotary)
        branch: Tensor
        if self.activation_checkpointing and torch.is_grad_enabled():
            branch = checkpoint(sublayer, hidden, meta, rotary, use_reentrant=False)
        else:
            branch = sublayer(hidden, meta, rotary)
        # The published mechanism: the graph of a dropped branch is built, and freed here.
        return branch.detach() if dropped else branch

    def output(self, hidden: Tensor) -> Output:
        """The output of the last stage's hidden states."""
        return Output(hidden, self.output_weight(), self.parts, self.config, self.output_source)

    def output_weight(self) -> nn.Parameter:
        """The matrix that makes logits: the head's, or the tied embedding's."""
        matrix = self.head if self.head is not None else self.embedding
        if matrix is None:
            raise ValueError("this stage has no output")
        return matrix.weight

    def shared_embedding_or_output_weight(self) -> nn.Parameter | None:
        """The copy of a tied embedding on this stage, if it has one (megatron-core's convention)."""
        if not self.config.tie_embeddings:
            return None
        if self.embedding is not None:
            return self.embedding.weight
        return self.head.weight if self.head is not None else None

    def linears(self) -> dict[str, LinearPart]:
        """Every linear part by each of its stems: the three stems of a fused q/k/v lead to one part."""
        parts = [module for module in self.modules() if isinstance(module, LinearPart)]
        return {block.stem: part for part in parts for block in part.blocks}

    def parameter_map(self) -> ParameterMap:
        """Canonical slices of every parameter of this stage, by local parameter name."""
        names: ParameterMap = {}
        for path, module in self.named_modules():
            if isinstance(module, (Norm, Matrix, LinearPart)):
                names.update({f"{path}.{name}": slices for name, slices in module.parameter_map().items()})
        return names
