"""Held-out text in bits per byte, one figure per language; held-out conversations in nats per trained token.

`bits per byte = sum over documents of -log2 p(tokens, end of document included) / UTF-8 bytes`: independent of the
tokenizer, so models with different vocabularies compare. Of a conversation only the assistant's turns count, and the
figure is the training loss's own unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from hcx.artifacts.durable import nothing
from hcx.data.batch import MicroBatch
from hcx.engine.base import Engine, ModelOutput

ROUNDS_PER_CALL = 16
"""Forwards between two signs of progress."""


@dataclass(frozen=True)
class ValidationSet:
    """Held-out rows of one language, or of one source of conversations.

    Attributes:
        language: of the text, or the source's name.
        micro_batches: every target of the documents once, weight 1.
        num_bytes: UTF-8 bytes of the documents; None: the figure is the loss, in nats per unit of weight.
    """

    language: str
    micro_batches: Sequence[MicroBatch]
    num_bytes: int | None

    @property
    def metric(self) -> str:
        """`bits_per_byte` or `loss`."""
        return "loss" if self.num_bytes is None else "bits_per_byte"

    @property
    def divisor(self) -> float:
        """What a sum of nats is divided by."""
        if self.num_bytes is not None:
            return math.log(2) * self.num_bytes
        return float(sum(batch.weights.double().sum() for batch in self.micro_batches))


def negative_log_likelihood(output: ModelOutput, micro_batch: MicroBatch) -> Tensor:
    """Nats of a micro-batch's targets, fp64."""
    return -(output.token_logprobs(micro_batch.labels).double() * micro_batch.weights.double()).sum()


def bits_per_byte(
    engine: Engine, sets: Sequence[ValidationSet], progress: Callable[[], None] = nothing
) -> dict[str, float]:
    """Each set's figure (`metric`) by its name; collective, the rows are shared out over the replicas.

    `progress` is called every few forwards.
    """
    place = engine.topology
    result = {}
    for held_out in sets:
        count = len(held_out.micro_batches)
        # Every replica makes the same number of forwards, because a forward may be collective (ZeRO-3).
        rounds = -(-count // place.dp_size)
        indices = [round_ * place.dp_size + place.dp_rank for round_ in range(rounds)]
        mine = [held_out.micro_batches[min(index, count - 1)].to(engine.device) for index in indices]
        nats = []
        for start in range(0, rounds, ROUNDS_PER_CALL):
            nats += engine.score(mine[start : start + ROUNDS_PER_CALL], negative_log_likelihood)
            progress()
        total = sum(float(value) for index, value in zip(indices, nats, strict=True) if index < count)
        if place.world_size > 1:
            summed = torch.tensor(total, dtype=torch.float64, device=engine.device)
            torch.distributed.all_reduce(summed)
            total = float(summed) / (place.world_size / place.dp_size)
        result[held_out.language] = total / held_out.divisor
    return result
