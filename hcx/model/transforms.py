"""The seam between methods that change training (compression, DropBP, adapters) and the engines.

`compress` and `dropbp` never import an engine: they implement `ModelTransform`, and the engine calls it.
Build order on every engine: structure per stage -> load weights -> `apply` -> freeze -> wrap -> optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from hcx.dist import Topology
from hcx.model.config import ModelConfig
from hcx.model.meta import ForwardMeta

EditMaster = Callable[[str, Tensor, dict[str, Tensor]], Tensor | None]
"""`fn(name, fp32_master, optimizer_state) -> new master or None for unchanged`; sees whole canonical tensors."""


@dataclass(frozen=True)
class TransformContext:
    """What `apply` may know: the model's shape, this rank's place, and how many chunks each pipeline stage holds."""

    config: ModelConfig
    topology: Topology
    chunks: int = 1
    num_micro_batches: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


class GradientSource(Protocol):
    """Gradients of a small part of the coming batch, without a step and without a trace."""

    def __call__(self, visit: Callable[[str, Tensor], None], rows: int = 1) -> float:
        """Visits (canonical name, full fp32 gradient) on every rank and returns the mean loss; see `Engine.gradients`.

        `rows` rows of each replica's first micro-batch are used, those with the most trained tokens. Every call starts
        from the same random state. Collective.
        """
        ...


class EditsMasters(Protocol):
    """The part of an engine that `after_step` and `finalize` use."""

    def edit_masters(self, names: Iterable[str], fn: EditMaster) -> None:
        """See `Engine.edit_masters`."""
        ...

    def scalars(self) -> dict[str, Any]:
        """See `Engine.scalars`: `optimizer_steps` counts the steps that made an update."""
        ...


class ModelTransform:
    """A method that hooks into building and stepping a model. Every hook has a neutral default."""

    def apply(self, chunk: nn.Module, context: TransformContext) -> None:
        """Changes the modules of one pipeline chunk, for example by replacing weight sources. Runs after loading."""

    def before_step(self, step: int) -> None:
        """Runs before the first forward of optimizer step `step`."""

    def probe(self, step: int, gradients: GradientSource) -> None:
        """Runs between two steps, after `before_step(step)`: may look at gradients (DropBP's sensitivities)."""

    def context(self, step: int, micro_batch: int, meta: ForwardMeta) -> ForwardMeta:
        """May extend a micro-batch's `ForwardMeta` (DropBP's mask). A pure function of its arguments and the seed."""
        return meta

    def after_step(self, step: int, engine: EditsMasters) -> dict[str, float]:
        """Runs after the optimizer step; may edit masters. Returns metrics to log."""
        return {}

    def finalize(self, engine: EditsMasters) -> None:
        """Runs once after the last step, before the model is exported."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state for resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""


class FixedDropMask(ModelTransform):
    """DropBP with a given mask per micro-batch: `masks(step, micro_batch) -> one bool per sublayer`."""

    def __init__(self, masks: Callable[[int, int], tuple[bool, ...]]) -> None:
        self._masks = masks

    def context(self, step: int, micro_batch: int, meta: ForwardMeta) -> ForwardMeta:
        return replace(meta, dropbp_mask=self._masks(step, micro_batch))
