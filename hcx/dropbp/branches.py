"""Droppable backward on models that are not ours: their residual branches, switched from outside.

Our decoder takes the mask as data. A foreign model does not, so the modules of a branch (its norm and what follows) run
their own forward without a graph while the branch is dropped; the residual addition outside them is untouched, and so
is every line of the model. The mask is set before a forward and stays until the next one, so that a recomputation under
gradient checkpointing sees the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hcx.dropbp.masks import Mask
from hcx.errors import ConfigError
from hcx.model.convert.branches import residual_blocks

Mechanism = Literal["no_grad", "detach"]


class SwitchedBranches:
    """Installed on a model, drops the backward of the branches that a mask names.

    Args:
        model: any model that `residual_blocks` knows.
        mechanism: `no_grad`: a dropped branch builds no graph; `detach`: it builds one, which is thrown away.

    Raises:
        ConfigError: the model has no residual branches that are known here.
    """

    def __init__(self, model: nn.Module, mechanism: Mechanism = "no_grad") -> None:
        self._blocks = residual_blocks(model)
        self._mechanism = mechanism
        self._mask: Mask | None = None
        self._replaced: list[nn.Module] = []
        index = 0
        for block in self._blocks:
            for branch in block.branches:
                modules = branch if mechanism == "no_grad" else branch[-1:]
                for module in modules:
                    self._wrap(module, index)
                index += 1
        self.count = index
        """Droppable sublayers."""

    def use(self, mask: Mask | None) -> None:
        """Sets the mask of the following forwards; None drops nothing."""
        if mask is not None and len(mask) != self.count:
            raise ConfigError(f"a mask of {len(mask)} sublayers, but the model has {self.count}")
        self._mask = mask
        for number, block in enumerate(self._blocks):
            per_block = len(block.branches)
            dropped = mask is not None and all(mask[number * per_block : (number + 1) * per_block])
            block.checkpoint(not dropped)

    def remove(self) -> None:
        """Gives the model its own forwards back."""
        self.use(None)
        for module in self._replaced:
            del module.forward
        self._replaced.clear()

    def _wrap(self, module: nn.Module, index: int) -> None:
        forward: Callable[..., Any] = module.forward

        def switched(*args: Any, **kwargs: Any) -> Any:
            if self._mask is None or not self._mask[index]:
                return forward(*args, **kwargs)
            if self._mechanism == "detach":
                return _detached(forward(*args, **kwargs))
            with torch.no_grad():
                return forward(*args, **kwargs)

        module.forward = switched  # type: ignore[method-assign]
        self._replaced.append(module)


def _detached(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach()
    return type(result)(_detached(part) for part in result) if isinstance(result, (tuple, list)) else result


@contextlib.contextmanager
def switched(model: nn.Module, mask: Mask | None, mechanism: Mechanism = "no_grad") -> Iterator[SwitchedBranches]:
    """A model under one mask, and as it was afterwards."""
    branches = SwitchedBranches(model, mechanism)
    branches.use(mask)
    try:
        yield branches
    finally:
        branches.remove()
