"""What a step took from all replicas, and the decisions that ranks take as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from hcx.data.batch import MicroBatch
from hcx.dist import Topology
from hcx.train.resilience import Action


@dataclass(frozen=True)
class GlobalStep:
    """A step over all replicas.

    Attributes:
        sources: rows of each source.
        samples: numbers of the samples, in order of the replicas.
        rows: how many.
        action: the greatest that any rank wants.
    """

    sources: Counter[str]
    samples: tuple[int, ...]
    rows: int
    action: Action


def exchange(place: Topology, batches: Sequence[MicroBatch], action: Action) -> GlobalStep:
    """Sums up this rank's micro-batches with those of the others; collective."""
    sources = Counter(source for batch in batches for source in batch.sources)
    samples = tuple(sample for batch in batches for sample in batch.sample_ids)
    rows = len(samples)  # rows that only fill a batch have no number
    if place.world_size == 1:
        return GlobalStep(sources, samples, rows, action)
    # One rank answers for each replica.
    answers = place.tp_rank == place.pp_rank == 0
    everyone: list[Any] = [None] * place.world_size
    mine = (sources, samples, rows) if answers else (Counter(), (), 0)
    torch.distributed.all_gather_object(everyone, (*mine, action))
    return GlobalStep(
        sum((part[0] for part in everyone), Counter()),
        tuple(sample for part in everyone for sample in part[1]),
        sum(part[2] for part in everyone),
        max(part[3] for part in everyone),
    )


def first_reason(place: Topology, reason: str | None) -> str:
    """The reason of the lowest rank that has one; collective. A signal may reach another rank before rank 0."""
    everyone: list[str | None] = [reason]
    if place.world_size > 1:
        everyone = [None] * place.world_size
        torch.distributed.all_gather_object(everyone, reason)
    return next((found for found in everyone if found is not None), "another rank")


def any_rank(place: Topology, device: torch.device, *flags: bool) -> tuple[bool, ...]:
    """Each flag, true if it is on any rank; collective."""
    if place.world_size == 1:
        return flags
    summed = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(summed, op=torch.distributed.ReduceOp.MAX)
    return tuple(bool(flag) for flag in summed.tolist())
