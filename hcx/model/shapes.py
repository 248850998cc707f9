"""Which parameters a rank holds, by name and shape, without building a module and without torch.

The list is that of `Decoder.named_parameters()` for the same stage, in its order (libraries lay their flat buffers out
in it). Plans are made from it; a test and every rehearsal hold it against decoders built on the meta device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hcx.model.config import ModelConfig

Part = Literal["embedding", "attention", "mlp", "norm", "output"]

PARTS: tuple[Part, ...] = ("embedding", "attention", "mlp", "norm", "output")


@dataclass(frozen=True)
class LocalParameter:
    """One parameter of one rank.

    Attributes:
        names: canonical names of the tensors that it holds (parts of), in row order.
        shape: of this rank's share.
        global_shapes: of the whole canonical tensors, in the order of `names`.
        part: which part of the model it belongs to.
        tied_copy: a copy of the embedding that is the output's matrix on another stage.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    global_shapes: tuple[tuple[int, ...], ...]
    part: Part
    tied_copy: bool = False

    @property
    def numel(self) -> int:
        """Elements of this rank's share."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stage:
    """A pipeline stage of the decoder, or one of the chunks that a stage of an interleaved pipeline holds.

    Attributes:
        layers: global numbers of its blocks.
        pre, post: it holds the embedding; the final norm and the output.
    """

    layers: range
    pre: bool
    post: bool


def pipeline_stage(config: ModelConfig, pp_rank: int, pp_size: int) -> Stage:
    """Stage `pp_rank` of `pp_size` stages of equally many blocks."""
    share = config.num_layers // pp_size
    return Stage(range(pp_rank * share, (pp_rank + 1) * share), pp_rank == 0, pp_rank == pp_size - 1)


def stage_chunks(config: ModelConfig, pp_rank: int, pp_size: int, chunks: int) -> list[Stage]:
    """What a rank of an interleaved pipeline holds: every `pp_size`-th stage of one that is `chunks` times as deep.

    One chunk: the stage itself (Narayanan et al. 2021, section 2.2).
    """
    return [pipeline_stage(config, chunk * pp_size + pp_rank, chunks * pp_size) for chunk in range(chunks)]


def stage_parameters(config: ModelConfig, stage: Stage, tp_size: int = 1) -> list[LocalParameter]:
    """Parameters of one rank of `tp_size` that share a stage, in the order of `Decoder.named_parameters()`."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_size
    query, key = config.num_heads * dim, config.kv_heads * dim

    def norm(name: str) -> LocalParameter:
        return LocalParameter((f"{name}.weight",), (hidden,), ((hidden,),), "norm")

    def matrix(name: str, part: Part, tied_copy: bool = False) -> LocalParameter:
        whole = (config.vocab_size, hidden)
        return LocalParameter((name,), (whole[0] // tp_size, hidden), (whole,), part, tied_copy)

    def column(stem: str, part: Part, **rows: int) -> LocalParameter:
        names = tuple(f"{stem}.{name}.weight" for name in rows)
        shape = (sum(size // tp_size for size in rows.values()), hidden)
        return LocalParameter(names, shape, tuple((size, hidden) for size in rows.values()), part)

    def row(name: str, part: Part, columns: int) -> LocalParameter:
        return LocalParameter((f"{name}.weight",), (hidden, columns // tp_size), ((hidden, columns),), part)

    embedding = "model.embed_tokens.weight"
    apart = config.tie_embeddings and not (stage.pre and stage.post)
    found = [matrix(embedding, "embedding", tied_copy=apart)] if stage.pre else []
    for layer in stage.layers:
        stem = f"model.layers.{layer}"
        after = config.use_post_norm
        found += [
            norm(f"{stem}.input_layernorm"),
            *([norm(f"{stem}.post_norm1")] if after else []),
            column(f"{stem}.self_attn", "attention", q_proj=query, k_proj=key, v_proj=key),
            row(f"{stem}.self_attn.o_proj", "attention", query),
            norm(f"{stem}.post_attention_layernorm"),
            *([norm(f"{stem}.post_norm2")] if after else []),
            column(f"{stem}.mlp", "mlp", gate_proj=inner, up_proj=inner),
            row(f"{stem}.mlp.down_proj", "mlp", inner),
        ]
    if stage.post:
        found.append(norm("model.norm"))
        if not (stage.pre and config.tie_embeddings):
            found.append(matrix(embedding if config.tie_embeddings else "lm_head.weight", "output", tied_copy=apart))
    return found


def parameters_by_part(config: ModelConfig) -> dict[Part, int]:
    """Parameters of the whole model by part, tied embeddings once (as the embedding's)."""
    counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for parameter in stage_parameters(config, pipeline_stage(config, 0, 1)):
        counts[parameter.part] += parameter.numel
    return counts
