"""Quantization-aware training with a straight-through gradient, the baseline for occasional compression.

The forward computes with the compressed weight; the gradient is given to the latent one as if it had been used itself
(Bengio, Leonard & Courville 2013). So motion below half a cell adds up at any frequency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hcx.compress.regularise.config import AnyRule, BCQRule, UniformRule
from hcx.compress.regularise.rules import pack
from hcx.errors import ConfigError
from hcx.model.decoder import Decoder
from hcx.model.parts.sources import DenseSource, LinearBlock


class _PassGradient(torch.autograd.Function):
    """One tensor forward, the gradient to another."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, used: Tensor) -> Tensor:
        return used

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class StraightThroughSource(DenseSource):
    """A dense matrix that multiplies as its compressed version, block by block.

    The compressed version is made anew in every forward: nothing has to be told when the masters move, and nothing
    dense is kept beside the weight.

    Args:
        base: the source in place; its parameter is used.
        rules: module -> rule; blocks without one multiply as they are.
    """

    def __init__(self, base: DenseSource, rules: Mapping[str, AnyRule]) -> None:
        super().__init__(base.weight, base.blocks)
        self._rules = {block.stem: rules[block.stem] for block in base.blocks if block.stem in rules}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            used = torch.cat([self._compressed(block) for block in self.blocks])
        return F.linear(x, _PassGradient.apply(self.weight, used))

    def _compressed(self, block: LinearBlock) -> Tensor:
        weight = self.weight.detach()[slice(*block.rows)]
        rule = self._rules.get(block.stem)
        # As at the last event, so that what is trained is what is written.
        return weight if rule is None else pack(rule, weight.float(), last=True).dequantize(weight.dtype)


def use_straight_through(chunk: Decoder, rules: Mapping[str, AnyRule]) -> None:
    """Lets the linear layers of a chunk compute with their compressed weights.

    Raises:
        ConfigError: a layer is split over ranks so that a group of inputs would be, or a rule is for another matrix.
    """
    for part in dict.fromkeys(chunk.linears().values()):
        chosen = {block.stem: rules[block.stem] for block in part.blocks if block.stem in rules}
        if not chosen or not isinstance(part.source, DenseSource):
            continue
        for block in part.blocks:
            rule = chosen.get(block.stem)
            if not isinstance(rule, BCQRule | UniformRule) or block.split != "row" or block.tp_size == 1:
                continue
            group = min(rule.group_size, block.global_shape[1])
            if block.in_features % group:
                raise ConfigError(
                    f"regularise: groups of {group} inputs do not divide the {block.in_features} inputs of "
                    f"{block.stem} that one of engine.tensor_parallel = {block.tp_size} ranks holds; choose a "
                    "group_size that does, or method: period"
                )
        part.replace_source(StraightThroughSource(part.source, chosen))
