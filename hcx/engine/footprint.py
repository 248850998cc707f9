"""Bytes that a rank keeps for weights, gradients and optimizer, for every engine and layout, without building one.

What the libraries allocate, padding included: DeepSpeed's flat groups and partitions, megatron-core's parameter and
gradient buffers and the ranges that its distributed optimizer shards them into. These numbers are held against
`Engine.held_tensors`, byte for byte, in tests and in every rehearsal.

Adam's step counters (4 bytes per tensor) and what lives only within a step are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.model.config import ModelConfig
from hcx.model.shapes import LocalParameter, Stage, stage_chunks, stage_parameters
from hcx.optim import OptimConfig, parameter_groups, state_keys

FP32 = 4
DTYPE_BYTES = {"fp32": 4, "bf16": 2}

_ZERO_START_ALIGNMENT = 2
"""DeepSpeed's `nccl_start_alignment_factor`: a flat group is a multiple of this times the replicas."""
_BUCKET_ALIGNMENT, _PARAMETER_ALIGNMENT = 128, 64
"""megatron-core's, in elements, with a distributed optimizer: ends of buckets, starts of parameters."""

AnyEngineConfig = TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig


@dataclass(frozen=True)
class Held:
    """Bytes on one rank between two steps.

    Attributes:
        weights: the working copy that forwards read.
        gradients: buffers that the engine keeps, or the gradients at the end of the last backward.
        masters: fp32 weights that are not the working copy itself.
        state: of the optimizer (AdamW's two moments).
        host: what of gradients, masters and state lies in host memory.
    """

    weights: int
    gradients: int
    masters: int
    state: int
    host: int = 0

    @property
    def optimizer(self) -> int:
        """Masters and state."""
        return self.masters + self.state

    @property
    def total(self) -> int:
        """Everything on the accelerator."""
        return self.weights + self.gradients + self.optimizer - self.host


def layout_sizes(engine: AnyEngineConfig, world_size: int) -> tuple[int, int, int]:
    """(tensor parallel, pipeline, data parallel) ranks of an engine on `world_size` processes."""
    tp, pp = (engine.tensor_parallel, engine.pipeline_parallel) if isinstance(engine, MegatronEngineConfig) else (1, 1)
    return tp, pp, world_size // (tp * pp)


def rank_chunks(engine: AnyEngineConfig, model: ModelConfig, world_size: int, pp_rank: int) -> list[Stage]:
    """The parts of the decoder that a rank of stage `pp_rank` holds: one, or several of an interleaved pipeline."""
    _, pp, _ = layout_sizes(engine, world_size)
    chunks = engine.virtual_pipeline_parallel if isinstance(engine, MegatronEngineConfig) else 1
    return stage_chunks(model, pp_rank, pp, chunks)


def held_bytes(
    engine: AnyEngineConfig, model: ModelConfig, optim: OptimConfig, world_size: int, pp_rank: int = 0, dp_rank: int = 0
) -> Held:
    """Bytes that a rank keeps when all weights are trained.

    Args:
        engine: a legal layout.
        model: the decoder.
        optim: the optimizer.
        world_size: processes of the run.
        pp_rank: the stage.
        dp_rank: the replica. Tensor-parallel ranks of a stage and replica hold equally much.
    """
    tp, _, dp = layout_sizes(engine, world_size)
    chunks = [stage_parameters(model, stage, tp) for stage in rank_chunks(engine, model, world_size, pp_rank)]
    if isinstance(engine, MegatronEngineConfig):
        return _megatron(engine, chunks, optim, dp, dp_rank)
    (parameters,) = chunks
    if isinstance(engine, DeepSpeedEngineConfig):
        return _deepspeed(engine, parameters, model, optim, dp)
    return _torch(engine, parameters, optim)


def _state_numbers(parameters: Sequence[LocalParameter], optim: OptimConfig) -> list[int]:
    """How many state tensors of its own size each parameter has, of the group of its first canonical tensor."""
    names: dict[str, int] = {}
    for group in parameter_groups(_global_shapes(parameters), optim):
        names.update(dict.fromkeys(group.names, len(state_keys(group, optim))))
    return [names[parameter.names[0]] for parameter in parameters]


def _global_shapes(parameters: Sequence[LocalParameter]) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for parameter in parameters
        for name, shape in zip(parameter.names, parameter.global_shapes, strict=True)
    }


def _torch(engine: TorchEngineConfig, parameters: Sequence[LocalParameter], optim: OptimConfig) -> Held:
    total = sum(parameter.numel for parameter in parameters)
    state = sum(p.numel * count for p, count in zip(parameters, _state_numbers(parameters, optim), strict=True))
    return Held(
        weights=total * DTYPE_BYTES[engine.precision],
        gradients=total * FP32,
        # In fp32 the masters are views of the weights.
        masters=0 if engine.precision == "fp32" else total * FP32,
        state=state * FP32,
    )


def _deepspeed(
    engine: DeepSpeedEngineConfig, parameters: Sequence[LocalParameter], model: ModelConfig, optim: OptimConfig, dp: int
) -> Held:
    size, stage = DTYPE_BYTES[engine.precision], engine.zero_stage
    offloads = engine.offload_optimizer == "cpu"
    total = sum(parameter.numel for parameter in parameters)
    keys = max(_state_numbers(parameters, optim), default=0)
    if stage == 0:
        return Held(weights=total * size, gradients=total * FP32, masters=0, state=total * keys * FP32)
    if stage == 3:
        share = sum(-(-parameter.numel // dp) for parameter in parameters)
        # Small parameters stay gathered (`stage3_param_persistence_threshold`), from shares that are all equally long.
        kept = sum(-(-p.numel // dp) * dp for p in parameters if p.numel <= model.hidden_size)
        # In host memory, what is accumulated and what the optimizer reads are two buffers.
        gradients = share * FP32 * (2 if offloads else 1)
        optimizer = share * (1 + keys) * FP32
        return Held(
            weights=(share + kept) * size,
            gradients=gradients,
            masters=share * FP32,
            state=share * keys * FP32,
            host=gradients + optimizer if offloads else 0,
        )
    alignment = _ZERO_START_ALIGNMENT * dp
    padded = sum(-(-count // alignment) * alignment for count in _group_sizes(parameters, optim))
    share = padded // dp
    # Stage 1 keeps whole gradients until the step cuts this rank's share of them; stage 2 only the share.
    whole = total * size if stage == 1 else 0
    partition = share * FP32 + (share * size if offloads else 0)
    return Held(
        weights=padded * size,
        gradients=whole + partition,
        masters=share * FP32,
        state=share * keys * FP32,
        host=partition + share * (1 + keys) * FP32 if offloads else 0,
    )


def _group_sizes(parameters: Sequence[LocalParameter], optim: OptimConfig) -> list[int]:
    """Elements of each parameter group; a fused parameter belongs to the group of its tensors."""
    number_of = {
        name: number
        for number, group in enumerate(parameter_groups(_global_shapes(parameters), optim))
        for name in group.names
    }
    counts: dict[int, int] = {}
    for parameter in parameters:
        number = number_of[parameter.names[0]]
        counts[number] = counts.get(number, 0) + parameter.numel
    return list(counts.values())


def _megatron(
    engine: MegatronEngineConfig, chunks: Sequence[list[LocalParameter]], optim: OptimConfig, dp: int, dp_rank: int
) -> Held:
    parameters = [parameter for chunk in chunks for parameter in chunk]
    size, total = DTYPE_BYTES[engine.precision], sum(parameter.numel for parameter in parameters)
    numbers = _state_numbers(parameters, optim)
    if not engine.distributed_optimizer:
        state = sum(parameter.numel * count for parameter, count in zip(parameters, numbers, strict=True))
        masters = 0 if engine.precision == "fp32" else total * FP32
        return Held(weights=total * size, gradients=total * FP32, masters=masters, state=state * FP32)
    keys = max(numbers, default=0)
    length, owned = 0, 0
    # Each chunk has a buffer of its own.
    for begin, end, members in (bucket for chunk in chunks for bucket in _buckets(chunk, dp)):
        share = (end - begin) // dp
        low, high = begin + dp_rank * share, begin + (dp_rank + 1) * share
        owned += sum(max(0, min(high, stop) - max(low, start)) for start, stop in members)
        length += end - begin
    return Held(
        weights=length * size,
        gradients=length * FP32,
        # In fp32 the masters are views of the weights' buffer.
        masters=0 if engine.precision == "fp32" else owned * FP32,
        state=owned * keys * FP32,
    )


def _buckets(parameters: Sequence[LocalParameter], dp: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(begin, end, ranges of its parameters) of each bucket of megatron-core's buffer, last parameter first.

    Without overlapping reductions there is one bucket, and one more for each copy of a tied embedding.
    """
    alignment = math.lcm(dp, _BUCKET_ALIGNMENT)
    begin, place = 0, 0
    members: list[tuple[int, int]] = []

    def padded(number: int, divisor: int) -> int:
        return -(-number // divisor) * divisor

    for parameter in reversed(parameters):
        place = padded(place, _PARAMETER_ALIGNMENT)
        if parameter.tied_copy and members:
            end = padded(place, alignment)
            yield begin, end, members
            begin, place, members = end, end, []
        members.append((place, place + parameter.numel))
        place += parameter.numel
        if parameter.tied_copy:
            end = padded(place, alignment)
            yield begin, end, members
            begin, place, members = end, end, []
    if members:
        yield begin, padded(place, alignment), members
