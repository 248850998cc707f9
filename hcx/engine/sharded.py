"""What the DeepSpeed and Megatron engines share: masters and optimizer state through canonical names.

The libraries keep fp32 masters and optimizer state in flat shards, each in its own way. An engine names that way as a
`MasterAccess`; everything the seam promises about state follows from it here, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hcx.dist import init_process_group
from hcx.engine.base import Engine, StateReader, StateSlice
from hcx.engine.blocks import BlockMap
from hcx.errors import CheckpointError, ConfigError, did_you_mean
from hcx.model.naming import ParameterMap
from hcx.model.transforms import EditMaster
from hcx.optim import ParameterGroup


class MasterAccess(Protocol):
    """Where a library keeps the fp32 masters and the optimizer state of this rank."""

    def keys(self) -> tuple[str, ...]:
        """Keys of the optimizer state of a trained parameter, equal on every rank."""
        ...

    def fragment(self, parameter: str, key: str) -> Tensor:
        """The flat range that this rank holds of a local parameter's master or state; may be a copy."""
        ...

    def store(self, parameter: str, key: str, values: Tensor) -> None:
        """Writes back a changed `fragment`."""
        ...

    def set_step(self, step: int) -> None:
        """Sets the number of steps taken, which Adam's bias correction needs."""
        ...

    def held(self) -> list[Tensor]:
        """Masters and optimizer state of this rank, as allocated."""
        ...

    def push(self, name: str, master: Tensor) -> None:
        """Writes a full canonical master into the working copy; collective where the library makes it so."""
        ...


class ShardedEngine(Engine):
    """State access for engines whose library shards it.

    Subclasses set the attributes below and implement the computing methods.
    """

    _blocks: BlockMap
    """Who holds which part of the masters."""
    _masters: MasterAccess
    _trained: frozenset[str]
    """Canonical names of trained parameters, over all ranks; the others have a master only."""
    _steps: int
    """Optimizer steps made."""
    _answers_for_state: bool
    """Whether this rank takes part in `state_slices` (replicas of the same state: only the first one does)."""

    def _keys(self, name: str) -> tuple[str, ...]:
        return ("master", *self._masters.keys()) if name in self._trained else ("master",)

    def _read(self, name: str, key: str) -> Tensor:
        return self._blocks.gather(name, partial(self._masters.fragment, key=key))

    def _write(self, name: str, key: str, full: Tensor) -> None:
        for parameter in self._blocks.holders(name):
            values = self._masters.fragment(parameter, key)
            self._blocks.scatter(name, full, {parameter: values}.__getitem__, only=parameter)
            self._masters.store(parameter, key, values)
        if key == "master":
            self._masters.push(name, full)

    @torch.no_grad()
    def edit_masters(self, names: Iterable[str], fn: EditMaster) -> None:
        """See `Engine.edit_masters`. Gathers one canonical tensor at a time."""
        known = set(self._blocks.names)
        for name in names:
            if name not in known:
                raise ConfigError(f"no parameter is named {name!r}; {did_you_mean(name, known)}")
            state = {key: self._read(name, key) for key in self._keys(name) if key != "master"}
            edited = fn(name, self._read(name, "master"), state)
            if edited is not None:
                if tuple(edited.shape) != self._blocks.shape(name):
                    raise ValueError(f"{name}: edited to shape {tuple(edited.shape)}, was {self._blocks.shape(name)}")
                self._write(name, "master", edited.to(torch.float32))

    def state_slices(self) -> Iterator[StateSlice]:
        """See `Engine.state_slices`."""
        if not self._answers_for_state:
            return
        for name in self._blocks.names:
            for key in self._keys(name):
                yield from self._blocks.slices(name, key, partial(self._masters.fragment, key=key))

    @torch.no_grad()
    def load_slices(self, reader: StateReader) -> None:
        """See `Engine.load_slices`. State that the checkpoint lacks starts at zero."""
        stored, mine = set(reader.names()), set(self._blocks.names)
        if stored != mine:
            missing, extra = sorted(mine - stored), sorted(stored - mine)
            raise CheckpointError(
                f"the checkpoint does not hold this model: it lacks {missing[:3] or 'nothing'} "
                f"({len(missing)} parameters) and has {extra[:3] or 'nothing'} ({len(extra)} parameters) too many"
            )
        for name in self._blocks.names:
            available = set(reader.keys(name))
            for key in self._keys(name):
                if key == "master" or key in available:
                    full = reader.read(name, key).to(self.device)
                else:
                    full = torch.zeros(self._blocks.shape(name), device=self.device)
                if tuple(full.shape) != self._blocks.shape(name):
                    raise CheckpointError(
                        f"{name}: the checkpoint has shape {tuple(full.shape)}, the model {self._blocks.shape(name)}"
                    )
                self._write(name, key, full)

    @torch.no_grad()
    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.export_state`."""
        for name in self._blocks.names:
            yield name, self._read(name, "master").cpu()

    def scalars(self) -> dict[str, Any]:
        """The number of optimizer steps made."""
        return {"optimizer_steps": self._steps}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """See `Engine.load_scalars`."""
        self._steps = int(values.get("optimizer_steps", 0))
        self._masters.set_step(self._steps)


def trained_names(
    parameters: Mapping[str, nn.Parameter], blocks: ParameterMap, group: ProcessGroup | None
) -> frozenset[str]:
    """Canonical names of trained parameters over all ranks of a group; collective."""
    mine = {block.name for local, found in blocks.items() if parameters[local].requires_grad for block in found}
    if group is None or group.size() == 1:
        return frozenset(mine)
    everyone: list[set[str]] = [set()] * group.size()
    torch.distributed.all_gather_object(everyone, mine, group=group)
    return frozenset(set().union(*everyone))


def local_groups(blocks: ParameterMap, groups: Sequence[ParameterGroup], trained: frozenset[str]) -> dict[str, int]:
    """Local parameter name -> number of its group.

    Raises:
        ConfigError: the matrices of one fused parameter belong to different groups.
    """
    number_of = {name: number for number, group in enumerate(groups) for name in group.names}
    result = {}
    for local, found in blocks.items():
        names = [block.name for block in found if block.name in trained]
        if not names:
            continue
        other = next((name for name in names if number_of[name] != number_of[names[0]]), None)
        if other is not None:
            raise ConfigError(
                f"optim.rules treat {names[0]} and {other} differently, but this engine updates them as one fused "
                "matrix; give the matrices of q/k/v, and those of gate/up, the same rule, or use engine.kind = torch"
            )
        result[local] = number_of[names[0]]
    return result


def join_process_group(world_size: int) -> None:
    """Joins the default process group; the libraries want one for a single process too."""
    # Both libraries call collectives by names that newer torch versions call deprecated, once per weight and step.
    warnings.filterwarnings("ignore", message=".*_tensor` is deprecated", category=FutureWarning)
    # megatron-core's fp32 shards are views of the weights.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    if torch.distributed.is_initialized():
        return
    if world_size > 1:
        init_process_group()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def allocate_state(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor], keys: Sequence[str]) -> None:
    """Allocates the optimizer state that torch's optimizers would make in their first step.

    So that keys are the same before and after it, and a loaded state has where to go.
    """
    takes_step = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    for tensor in tensors:
        state = optimizer.state[tensor]
        for key in keys:
            state.setdefault(key, torch.zeros_like(tensor, dtype=torch.float32).detach())
        if takes_step:
            state.setdefault("step", _step_tensor(optimizer, tensor, 0))


def set_step(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor], step: int) -> None:
    """Sets the number of steps taken, which Adam's bias correction needs: one tensor per parameter, never shared."""
    for group in optimizer.param_groups:
        if "step" in group:  # fused optimizers of other libraries keep one number per group
            group["step"] = step
    for tensor in tensors:
        if "step" in optimizer.state[tensor]:
            optimizer.state[tensor]["step"] = _step_tensor(optimizer, tensor, step)


def _step_tensor(optimizer: torch.optim.Optimizer, tensor: Tensor, step: int) -> Tensor:
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return torch.tensor(float(step), device=tensor.device if on_device else "cpu")
