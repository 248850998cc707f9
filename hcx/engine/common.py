"""What every engine does alike: metadata of a micro-batch, the global divisor, sums over replicas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hcx.data.batch import MicroBatch
from hcx.engine.base import Objective
from hcx.model.meta import ForwardMeta
from hcx.model.transforms import ModelTransform

LOSS = "loss"
"""Key of the loss sum among an objective's sums."""


def plain_meta(micro_batch: MicroBatch) -> ForwardMeta:
    """A micro-batch's positions and document bounds."""
    return ForwardMeta(positions=micro_batch.positions, document_ids=micro_batch.document_ids)


def step_meta(
    transforms: Sequence[ModelTransform], step: int, micro_batch_index: int, micro_batch: MicroBatch
) -> ForwardMeta:
    """The metadata of a training forward: every transform may extend it."""
    meta = plain_meta(micro_batch)
    for transform in transforms:
        meta = transform.context(step, micro_batch_index, meta)
    return meta


def global_weight(
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    group: ProcessGroup | None,
    device: torch.device,
    replicas: int = 1,
) -> float:
    """The divisor of the loss: weights of all micro-batches of all replicas, before the first forward."""
    local = float(sum(objective.weight(micro_batch) for micro_batch in micro_batches))
    if replicas == 1:
        return local
    total = torch.tensor(local, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total, group=group)
    return float(total)


def reduce_sums(
    stored: Sequence[Mapping[str, Tensor]], group: ProcessGroup | None, replicas: int = 1
) -> dict[str, float]:
    """Sums of each key over micro-batches, in order and in fp64, then over replicas."""
    names = sorted(stored[0])
    totals = torch.stack([torch.stack([entry[name].detach().double() for entry in stored]).sum() for name in names])
    if replicas > 1:
        torch.distributed.all_reduce(totals, group=group)
    return dict(zip(names, totals.tolist(), strict=True))


def state_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    """The optimizers' state, without step counters."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [value for state in states for key, value in state.items() if isinstance(value, Tensor) and key != "step"]


def storage_bytes(held: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
    """Bytes of each kind's storages, whole, each storage counted once, with the first kind that has it."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for kind, tensors in held.items():
        sizes[kind] = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                sizes[kind] += storage.nbytes()
    return sizes
