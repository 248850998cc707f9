"""ZeRO 0 to 3 by DeepSpeed.

What is unusual here (measured; see ARCHITECTURE.md):
- The library divides gradients by the number of replicas, and would by the accumulation count: the loss given to it is
  `sum * replicas / global weight`, with `scale_wrt_gas=False`, so that nobody's division is left.
- The accumulation boundary is set by hand for each micro-batch, because a step may have any number of them.
- ZeRO-3 keeps a parameter's gradient of the previous step when this step gives it none (DropBP): its gradient buffer is
  cleared before every step.
- Writing a master leaves the working weight of the next forward stale: `push` writes that too.
- The library compiles a shared-memory collective at its first use on a CPU; it is told not to.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Step(nn.Module):
    """Forward and objective in one module: ZeRO-3 gathers weights only inside the forward of the wrapped module."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, micro_batch: MicroBatch, meta: ForwardMeta, finish: Callable[..., Any]) -> Any:
        """`finish(output, micro_batch)` of the decoder's output."""
        hidden = self.decoder(micro_batch.tokens, meta)
        return finish(self.decoder.output(hidden), micro_batch)


class _ZeroMasters:
    """Masters and optimizer state of one rank under ZeRO 0 to 3 (`MasterAccess`).

    Stage 0: the parameter is the master. Stages 1 and 2: a flat range of some parameters (`_hp_mapping`), cut where the
    ranks' shares end. Stage 3: every parameter is cut into equal ranges, one per rank, the last one padded.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Any,
        stage: int,
        rank: int,
        layout: BlockMap,
        keys: tuple[str, ...],
    ) -> None:
        self._parameters, self._optimizer, self._stage, self._rank = parameters, optimizer, stage, rank
        self._layout, self._keys = layout, keys
        self._inner = optimizer if stage == 0 else optimizer.optimizer
        self._allocate()

    def _allocate(self) -> None:
        """Allocates the optimizer state that the first step would make, so that a loaded state has where to go."""
        if self._stage == 0:
            flats = [parameter for group in self._inner.param_groups for parameter in group["params"]]
        elif self._stage == 3:
            flats = self._optimizer.fp32_partitioned_groups_flat
        else:
            flats = self._optimizer.single_partition_of_fp32_groups
        takes_step = isinstance(self._inner, torch.optim.Adam | torch.optim.AdamW)
        self._flats = flats
        for flat in flats:
            state = self._inner.state[flat]
            for key in self._keys:
                state.setdefault(key, torch.zeros_like(flat, dtype=torch.float32).detach())
            if takes_step:
                state.setdefault("step", torch.tensor(0.0))
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def set_step(self, step: int) -> None:
        """Sets the number of steps taken, which Adam's bias correction needs."""
        for flat in self._flats:
            if "step" in self._inner.state[flat]:
                self._inner.state[flat]["step"] = torch.tensor(float(step))

    def ranges(self) -> dict[str, tuple[int, int]] | None:
        """The flat range of each local parameter whose master lies on this rank; None: all of every parameter."""
        if self._stage == 0:
            return None
        return {name: span for name in self._parameters if (span := self._range(name)) is not None}

    def _range(self, name: str) -> tuple[int, int] | None:
        parameter = self._parameters[name]
        if self._stage == 3:
            share = (
                parameter.ds_tensor.ds_numel
                if hasattr(parameter.ds_tensor, "ds_numel")
                else parameter.ds_tensor.numel()
            )
            start, stop = self._rank * share, min((self._rank + 1) * share, parameter.ds_numel)
            return (start, stop) if start < stop else None
        if not parameter.requires_grad:
            return 0, parameter.numel()
        if parameter._hp_mapping is None:
            return None
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def keys(self) -> tuple[str, ...]:
        """See `MasterAccess`."""
        return self._keys

    def fragment(self, parameter: str, key: str) -> Tensor:
        """See `MasterAccess`."""
        tensor = self._parameters[parameter]
        span = self._range(parameter) if self._stage else (0, tensor.numel())
        if self._stage == 3:
            held = tensor.ds_tensor
            if tensor.requires_grad:
                held = (
                    safe_get_local_fp32_param(tensor)
                    if key == "master"
                    else safe_get_local_optimizer_state(tensor, key)
                )
            return held.detach().view(-1)[: span[1] - span[0]]
        if self._stage == 0 or not tensor.requires_grad:
            return tensor.data.view(-1) if key == "master" else self._inner.state[tensor][key].view(-1)
        return tensor._hp_mapping.get_hp_fragment(None if key == "master" else key)

    def push(self, name: str, master: Tensor) -> None:
        """Writes the working copy; a collective of all ranks under stage 3."""
        if self._stage == 3:
            for parameter in self._layout.holders(name):
                tensor = self._parameters[parameter]
                with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                    self._layout.scatter(name, master, lambda _, tensor=tensor: tensor.data.view(-1), only=parameter)
        else:
            self._layout.scatter(name, master, lambda parameter: self._parameters[parameter].data.view(-1))


class DeepSpeedEngine(ShardedEngine):
    """Runs optimizer steps with optimizer state, gradients and weights sharded over the replicas.

    Args:
        engine_config: the stage.
        model_config: the decoder.
        optim_config: optimizer, learning rate, weight decay.
        transforms: applied to the decoder after loading.
        weights: canonical tensors to start from.
        seed: of the initial weights that `weights` leaves open.
    """

    def train_step(self, batch: StepBatch, objective: Objective, lr_factor: float) -> StepStats:
        """See `Engine.train_step`."""
        weight = self._global_weight(batch.micro_batches, objective)
        if weight == 0:
            return StepStats(loss_sum=0.0, weight=0.0, skipped=True)
        self._impose_groups(lr_factor)
        loss_sum, metrics = self._backward(batch, objective, weight)
        if self._stage == 0:
            norm, skipped = self._step_unsharded()
        else:
            self._engine.step()
            skipped = bool(self._engine.optimizer.overflow)
            norm = float(self._engine.get_global_grad_norm())
        self._steps += not skipped
        return StepStats(loss_sum, weight, metrics, norm, skipped)

    def _backward(self, batch: StepBatch, objective: Objective, weight: float) -> tuple[float, dict[str, float]]:
        """Forward and backward of every micro-batch; the reduced gradients of loss / weight remain in the library."""
        self._engine.train()
        if self._stage == 3:
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        stored = []
        last = len(batch.micro_batches) - 1
        for index, micro_batch in enumerate(batch.micro_batches):
            meta = self._meta(batch.step, index, micro_batch)
            self._engine.set_gradient_accumulation_boundary(index == last)
            total, metrics = self._engine(micro_batch, meta, objective)
            stored.append({_LOSS: total.detach(), **{name: value.detach() for name, value in metrics.items()}})
            self._engine.backward(total * (self.topology.dp_size / weight), scale_wrt_gas=False)
        return self._reduce_sums(stored)

    def _step_unsharded(self) -> tuple[float, bool]:
        """Stage 0: zero gradients where there are none, clipping per group, and the step."""
        raise AssertionError

    def _forget_gradients(self) -> None:
        """Drops what a backward without a step left, as the library does when it skips a step."""
        optimizer = self._engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self._stage in (1, 2):
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
            optimizer.micro_step_id = -1
