"""Every distinct rank role of a layout's real shape, built on the meta device: no memory, all shapes.

A role is a pipeline stage (first, middle, last) of a given size; its tensor-parallel ranks are built all, because
together they must hold every row of every matrix once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hcx.engine.footprint import AnyEngineConfig, held_bytes, layout_sizes, rank_chunks
from hcx.errors import LaunchError
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.parts.base import Parts
from hcx.model.shapes import LocalParameter, Stage, pipeline_stage, stage_parameters
from hcx.optim import OptimConfig

_Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape within a canonical tensor."""


@dataclass(frozen=True)
class Role:
    """What was built, and agrees with the plan.

    Attributes:
        pp_ranks: the stages of this kind.
        blocks: blocks of each.
        parameters: of one rank.
        weights, optimizer: bytes of one rank of the first replica.
    """

    pp_ranks: tuple[int, ...]
    blocks: int
    parameters: int
    weights: int
    optimizer: int


class _MetaParts(Parts):
    """Shapes of one tensor-parallel rank, without communication."""

    def __init__(self, tp_size: int, tp_rank: int, dtype: torch.dtype) -> None:
        super().__init__(dtype, "meta")
        self.tp_size, self.tp_rank = tp_size, tp_rank


def build_stage(model: ModelConfig, stage: Stage, tp_size: int, tp_rank: int, dtype: torch.dtype) -> Decoder:
    """One rank's part of the decoder on the meta device."""
    return Decoder(model, _MetaParts(tp_size, tp_rank, dtype), layers=stage.layers, pre=stage.pre, post=stage.post)


def check_roles(engine: AnyEngineConfig, model: ModelConfig, optim: OptimConfig, world_size: int) -> list[Role]:
    """Builds every role of the real shape and holds it against the plan's numbers.

    Raises:
        LaunchError: a built rank differs from the plan, or the ranks do not hold every tensor exactly once.
    """
    tp, pp, _ = layout_sizes(engine, world_size)
    held: dict[str, set[_Block]] = {}
    roles = []
    for pp_ranks in _kinds(pp):
        chunks = rank_chunks(engine, model, world_size, pp_ranks[0])
        planned = [stage_parameters(model, chunk, tp) for chunk in chunks]
        for chunk, counted in zip(chunks, planned, strict=True):
            for tp_rank in range(tp):
                decoder = build_stage(model, chunk, tp, tp_rank, _dtype(engine))
                _compare(decoder, counted, pp_ranks[0], tp_rank)
                if tp_rank in (0, tp - 1):
                    _forward(decoder, chunk, model, tp)
                for name, block in _blocks(decoder):
                    held.setdefault(name, set()).add(block)
        bytes_of_rank = held_bytes(engine, model, optim, world_size, pp_ranks[0])
        roles.append(
            Role(
                pp_ranks=tuple(pp_ranks),
                blocks=sum(len(chunk.layers) for chunk in chunks),
                parameters=sum(parameter.numel for counted in planned for parameter in counted),
                weights=bytes_of_rank.weights,
                optimizer=bytes_of_rank.optimizer,
            )
        )
    built = [chunk for role in roles for chunk in rank_chunks(engine, model, world_size, role.pp_ranks[0])]
    _check_cover(held, model, {layer for chunk in built for layer in chunk.layers})
    return roles


def _dtype(engine: AnyEngineConfig) -> torch.dtype:
    return torch.bfloat16 if engine.precision == "bf16" else torch.float32


def _kinds(pp: int) -> list[range]:
    """Stages that are built alike: the first, those in the middle, the last."""
    return [kind for kind in (range(1), range(1, pp - 1), range(max(1, pp - 1), pp)) if len(kind)]


def _compare(decoder: Decoder, planned: list[LocalParameter], pp_rank: int, tp_rank: int) -> None:
    built = dict(decoder.named_parameters())
    names = {local: tuple(block.name for block in blocks) for local, blocks in decoder.parameter_map().items()}
    found = [(names[local], tuple(parameter.shape)) for local, parameter in built.items()]
    wanted = [(parameter.names, parameter.shape) for parameter in planned]
    if found != wanted:
        differing = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), (found, wanted))
        raise LaunchError(
            f"stage {pp_rank}, tensor-parallel rank {tp_rank}: the decoder has {differing[0]} where the plan counts "
            f"{differing[1]}; please report this"
        )


def _forward(decoder: Decoder, stage: Stage, model: ModelConfig, tp: int) -> None:
    """Runs the stage's shapes: heads, widths and rows must fit one another."""
    # One row of a few tokens: shapes do not depend on how many.
    tokens = torch.zeros(1, 2 * tp, dtype=torch.int64, device="meta")
    inputs = (
        tokens if stage.pre else torch.zeros(2 * tp, 1, model.hidden_size, device="meta", dtype=decoder.parts.dtype)
    )
    with torch.no_grad():
        hidden = decoder(inputs, ForwardMeta())
    if tuple(hidden.shape) != (2 * tp, 1, model.hidden_size):
        raise LaunchError(f"a stage of blocks {stage.layers} gives {tuple(hidden.shape)}; please report this")


def _blocks(decoder: Decoder) -> Iterator[tuple[str, _Block]]:
    """(canonical name, block) of everything on this rank."""
    parameters = dict(decoder.named_parameters())
    for local, slices in decoder.parameter_map().items():
        for found in slices:
            yield found.name, (found.offset, tuple(found.view(parameters[local]).shape))


def _check_cover(held: dict[str, set[_Block]], model: ModelConfig, layers: set[int]) -> None:
    """Replicas and copies of tied embeddings are one block; the blocks of a tensor together are as large as it."""
    for name, shape in _canonical(model, layers):
        count = sum(math.prod(size) for _, size in held.get(name, ()))
        if count != math.prod(shape):
            raise LaunchError(f"{name}: the ranks hold {count} of {math.prod(shape)} elements; please report this")


def _canonical(model: ModelConfig, layers: set[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical tensors of the stages that were built, which hold these layers."""
    for parameter in stage_parameters(model, pipeline_stage(model, 0, 1)):
        for name, shape in zip(parameter.names, parameter.global_shapes, strict=True):
            words = name.split(".")
            if "layers" not in words or int(words[words.index("layers") + 1]) in layers:
                yield name, shape
