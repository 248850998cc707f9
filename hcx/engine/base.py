"""The seam between the trainer and whatever runs one optimizer step.

The seam is one optimizer step on this data-parallel rank's slice of the batch: anything finer would leak pipeline
schedules, anything coarser would hide the step from callbacks.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hcx.data.batch import MicroBatch
from hcx.dist import Topology
from hcx.model.transforms import EditMaster


class ModelOutput(Protocol):
    """What the last stage computed for one micro-batch."""

    def token_logprobs(self, labels: Tensor) -> Tensor:
        """Log-probability of each label, `[batch, seq]` fp32, differentiable; chunked and vocabulary-parallel."""
        ...

    def logits(self) -> Tensor:
        """All logits `[batch, seq, vocab]` fp32, gathered over tensor parallelism. For tests and sampling."""
        ...

    def values(self) -> Tensor:
        """A scalar head's values `[batch, seq]` (reward and value models)."""
        ...


class Objective(Protocol):
    """A training loss: a weighted sum, and the weight that it is divided by."""

    def weight(self, micro_batch: MicroBatch) -> float:
        """The micro-batch's share of the divisor. Depends on data only: it is reduced over ranks before the forward."""
        ...

    def __call__(self, output: ModelOutput, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of losses, metrics as sums) of a micro-batch. Nobody divides by anything here."""
        ...


@dataclass(frozen=True)
class StepBatch:
    """What one data-parallel rank processes in one optimizer step. All micro-batches have one shape.

    Attributes:
        step: number of the step, from 0.
        micro_batches: this rank's slice of the global batch.
        max_loss, max_grad_norm: above them (mean loss; norm before clipping) no update is made.
    """

    step: int
    micro_batches: Sequence[MicroBatch]
    max_loss: float = math.inf
    max_grad_norm: float = math.inf

    def refuses(self, loss: float, grad_norm: float) -> bool:
        """Whether no update may be made: a value is not finite or above its limit."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        return not finite or loss > self.max_loss or grad_norm > self.max_grad_norm


@dataclass(frozen=True)
class StepStats:
    """What happened in a step, reduced over data-parallel ranks and equal on every rank.

    Attributes:
        loss_sum: sum of losses over the global batch.
        weight: the global divisor; `loss_sum / weight` is the loss.
        metrics: the objective's metrics, summed over the global batch.
        grad_norm: global norm before clipping, per clip group in `grad_norms`.
        skipped: no update was made (total weight 0, or the batch's limits refuse the loss or the norm).
    """

    loss_sum: float
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    skipped: bool = False

    @property
    def loss(self) -> float:
        """Mean loss per unit of weight (per token), in nats."""
        return self.loss_sum / self.weight if self.weight else float("nan")


@dataclass(frozen=True)
class StateSlice:
    """A block of a canonical tensor, or a flat range of such a block.

    Attributes:
        name: canonical parameter name.
        key: `master`, `exp_avg`, `exp_avg_sq`, or another name of optimizer state.
        global_shape: shape of the whole canonical tensor.
        offset: where the block begins.
        shape: shape of the block.
        flat_range: `(start, stop)` within the flattened block that `tensor` (then 1-D) covers; None: the whole block.
        tensor: the values, fp32, on any device.
    """

    name: str
    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    tensor: Tensor
    flat_range: tuple[int, int] | None = None


class StateReader(Protocol):
    """Random access to the full canonical tensors of a checkpoint, whatever the layout that wrote it."""

    def names(self) -> Iterable[str]:
        """Canonical parameter names."""
        ...

    def keys(self, name: str) -> Iterable[str]:
        """The keys stored for a name."""
        ...

    def read(self, name: str, key: str) -> Tensor:
        """One full canonical tensor, fp32, CPU."""
        ...


class Engine(abc.ABC):
    """Runs optimizer steps. Every method is collective: all ranks call it, in the same order."""

    topology: Topology
    """This process's place; the trainer uses only `dp_rank` and `dp_size`."""
    device: torch.device
    """Where micro-batches must lie."""

    @abc.abstractmethod
    def train_step(self, batch: StepBatch, objective: Objective, lr_factor: float) -> StepStats:
        """One optimizer step: forward and backward of every micro-batch, reduction, clipping, update.

        `objective.weight` of all micro-batches is summed over ranks before the first backward, and the loss is scaled
        by 1/total there; nobody divides later. Each parameter group's learning rate is imposed as
        `base lr * lr_mult * lr_factor`, and its weight decay too, every step: optimizers and loaders lose them.
        A parameter without a gradient counts as zero gradient (`missing_gradients: skip` leaves it untouched).
        If `batch.refuses` the loss or the norm, nothing is updated, and the optimizer's step count stays.
        """

    @abc.abstractmethod
    def score(
        self, micro_batches: Sequence[MicroBatch], fn: Callable[[ModelOutput, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """Forward only, evaluation mode, no graph: `fn` of each of this data-parallel rank's micro-batches.

        The results are the same on every rank of a model replica.
        """

    @abc.abstractmethod
    def gradients(self, batch: StepBatch, objective: Objective, visit: Callable[[str, Tensor], None]) -> float:
        """Backward without a step: visits (canonical name, full fp32 gradient), and returns the mean loss.

        Accumulated gradients, RNG states and everything else are as before afterwards. `visit` is called on every rank
        with the gradient of the global batch; parameters without gradient are visited with zeros.
        """

    @abc.abstractmethod
    def edit_masters(self, names: Iterable[str], fn: EditMaster) -> None:
        """Replaces fp32 master weights and the working copy with them, under any sharding.

        `fn(name, full fp32 master, optimizer state)` returns the new master or None. It runs on every rank and must be
        deterministic. `state` holds full tensors of the optimizer state and is read-only.
        """

    @abc.abstractmethod
    def state_slices(self) -> Iterator[StateSlice]:
        """This rank's part of masters and optimizer state; together the ranks cover every canonical tensor once."""

    @abc.abstractmethod
    def load_slices(self, reader: StateReader) -> None:
        """Restores masters, working copies and optimizer state from full canonical tensors."""

    @abc.abstractmethod
    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, full fp32 tensor on the CPU) of every parameter, one at a time, on every rank."""

    @abc.abstractmethod
    def set_rope_theta(self, theta: float) -> None:
        """Sets the base of the rotary embedding for all later forwards (a stage with another sequence length)."""

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """What this rank keeps between steps, by `weights`, `gradients`, `optimizer`; empty where it is not known.

        Tensors may be views of one storage; local. `hcx.engine.footprint` says the same without building an engine.
        """
        return {}

    def scalars(self) -> dict[str, Any]:
        """JSON-serialisable state beside the slices (optimizer step count)."""
        return {}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Restores `scalars()`."""

    def close(self) -> None:
        """Releases what the engine holds; the process group stays."""
        return None
