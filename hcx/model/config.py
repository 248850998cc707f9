"""The shape and options of the one decoder."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from hcx.config import Config


class ModelConfig(Config):
    """A decoder-only transformer: `llama`, or `hyperclovax` with its muP multipliers and Peri-LN.

    Field names are ours; `hcx.model.convert.hf` maps them to and from Hugging Face's `config.json`.
    """

    architecture: Literal["llama", "hyperclovax"] = "llama"
    """Which published architecture the exported directory states."""
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the gated MLP."""
    num_layers: int
    """Blocks; each has an attention and an MLP sublayer."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; equal to `num_heads` if not given, and must divide it."""
    head_dim: int | None = None
    """Width of a head; `hidden_size / num_heads` if not given."""
    max_seq_len: int = 4096
    """The longest sequence the model is meant for."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = False
    """Whether the output uses the embedding matrix."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    attention_multiplier: float | None = None
    """Scale of the attention scores (hyperclovax); `1/sqrt(head_dim)` if not given."""
    residual_multiplier: float = 1.0
    """Factor of each sublayer's output before the residual addition (hyperclovax)."""
    embedding_multiplier: float = 1.0
    """Factor of the embedding's output (hyperclovax)."""
    logits_scaling: float = 1.0
    """Factor of the logits (hyperclovax)."""
    use_post_norm: bool = False
    """Peri-LN: a second norm on each sublayer's output (hyperclovax)."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of a head, resolved."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def attention_scale(self) -> float:
        """Factor of `q @ k^T`."""
        return self.head_size**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def num_sublayers(self) -> int:
        """Droppable residual sublayers: 2 per block, attention first."""
        return 2 * self.num_layers

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_seq_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; must be at least 1")
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}; set head_dim"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim = {self.head_size}; the rotary embedding needs an even number")
        plain = (
            self.attention_multiplier is None
            and self.residual_multiplier == self.embedding_multiplier == self.logits_scaling == 1.0
            and not self.use_post_norm
        )
        if self.architecture == "llama" and not plain:
            raise ValueError("the multipliers and use_post_norm belong to architecture: hyperclovax")
        return self
