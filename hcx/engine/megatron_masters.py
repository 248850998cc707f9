"""Where megatron-core's optimizers keep the fp32 masters: one place for names that the library calls private.

Three layouts, by optimizer class: `FP32Optimizer` (the parameter is the master), `Float16OptimizerWithFloat16Params`
(`parameter.main_param`), and `DistributedOptimizer` (a flat shard per data-parallel rank, found through its range
maps). This module knows them by their attributes and does not import the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hcx.engine.blocks import BlockMap
from hcx.engine.common import state_tensors
from hcx.engine.sharded import allocate_state, set_step


class MegatronMasters:
    """Masters and optimizer state of one rank (`MasterAccess`).

    Args:
        parameters: this rank's local parameters.
        optimizer: the library's optimizer that steps them (one member of its `ChainedOptimizer`).
        layout: whole local parameters as blocks, for writing the working copy.
        keys: keys of the optimizer state.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Any, layout: BlockMap, keys: tuple[str, ...]
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._layout = layout
        self._keys = keys
        self._distributed = hasattr(optimizer, "model_param_group_index_map")
        if optimizer.optimizer is not None:
            allocate_state(optimizer.optimizer, self._stepped(), keys)

    def ranges(self) -> dict[str, tuple[int, int]] | None:
        """The flat range of each local parameter whose master lies on this rank; None: all of every parameter."""
        if not self._distributed:
            return None
        ranges = {}
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad:
                ranges[name] = (0, parameter.numel())
            elif parameter in self._optimizer.model_param_group_index_map:
                span = self._optimizer._get_model_param_range_map(parameter)["param"]
                ranges[name] = (span.start, span.end)
        return ranges

    def _master(self, name: str) -> Tensor:
        """The tensor that the inner optimizer steps; the parameter itself where it is not trained."""
        parameter = self._parameters[name]
        if not parameter.requires_grad:
            return parameter.data
        if self._distributed:
            group, order = self._optimizer.model_param_group_index_map[parameter]
            return self._optimizer.optimizer.param_groups[group]["params"][order]
        return getattr(parameter, "main_param", parameter)

    def _stepped(self) -> list[Tensor]:
        """The tensors that the inner optimizer steps."""
        inner = self._optimizer.optimizer
        return [] if inner is None else [master for group in inner.param_groups for master in group["params"]]

    def held(self) -> list[Tensor]:
        """Masters and optimizer state of this rank."""
        inner = self._optimizer.optimizer
        return [*self._stepped(), *([] if inner is None else state_tensors([inner]))]

    def set_step(self, step: int) -> None:
        """Sets the number of steps taken, which Adam's bias correction needs."""
        if self._optimizer.optimizer is not None:
            set_step(self._optimizer.optimizer, self._stepped(), step)

    def keys(self) -> tuple[str, ...]:
        """See `MasterAccess`."""
        return self._keys

    def fragment(self, parameter: str, key: str) -> Tensor:
        """See `MasterAccess`; always a view."""
        master = self._master(parameter)
        if key == "master":
            return master.detach().view(-1)
        return self._optimizer.optimizer.state[master][key].view(-1)

    def store(self, parameter: str, key: str, values: Tensor) -> None:
        """See `MasterAccess`: `fragment` is a view, so that nothing is left to do."""

    def push(self, name: str, master: Tensor) -> None:
        """Writes every resident working weight; the whole weight lies on each rank, so that none must be sent."""
        self._layout.scatter(name, master, lambda parameter: self._parameters[parameter].data.view(-1))
