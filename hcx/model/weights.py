"""Where a decoder's first weights come from: an initialisation, or a MODEL directory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from hcx.dist import derived_generator
from hcx.errors import CheckpointError
from hcx.model.config import ModelConfig
from hcx.model.naming import ParameterMap


class WeightsProvider(Protocol):
    """Full canonical tensors by name."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One full canonical tensor, fp32, CPU.

        Raises:
            CheckpointError: the name is unknown or the shape differs.
        """
        ...


class InitWeights:
    """Random initial weights, each tensor a function of (seed, canonical name): every sharding starts equal.

    Matrices are normal with `initializer_range`; those that write to the residual stream (`o_proj`, `down_proj`) are
    divided by `sqrt(2 * num_layers)` (GPT-2's rule), so that the stream's variance does not grow with depth.
    Norms are 1.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `WeightsProvider.tensor`."""
        if len(shape) == 1:
            return torch.ones(shape)
        std = self._config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * self._config.num_layers) ** 0.5
        return torch.randn(shape, generator=derived_generator(self._seed, "init", name)).mul_(std)


class TensorWeights:
    """Weights from a function that reads one canonical tensor, such as an open model directory."""

    def __init__(self, read: Callable[[str], Tensor], source: str) -> None:
        self._read, self._source = read, source

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `WeightsProvider.tensor`."""
        found = self._read(name)
        if tuple(found.shape) != tuple(shape):
            raise CheckpointError(
                f"{self._source}: {name} has shape {tuple(found.shape)}, the configuration says {tuple(shape)}"
            )
        return found.float()


@torch.no_grad()
def load_weights(module: nn.Module, names: ParameterMap, weights: WeightsProvider) -> None:
    """Fills local parameters from full canonical tensors: every block of every parameter in `names`."""
    parameters = dict(module.named_parameters())
    for local_name, blocks in names.items():
        for block in blocks:
            local = block.view(parameters[local_name])
            full = weights.tensor(block.name, block.global_shape)
            where = tuple(slice(o, o + n) for o, n in zip(block.offset, local.shape, strict=True))
            local.copy_(full[where])
