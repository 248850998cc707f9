"""What is compressed, and how: a default and ordered exceptions by name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from hcx.compress.bcq import SCALE_DTYPES, quantize
from hcx.compress.uniform import quantize_uniform
from hcx.config import Config
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight
from hcx.kernels.format import MAX_BITS

MethodName = Literal["alternating", "greedy", "uniform"]
METHODS: tuple[MethodName, ...] = ("alternating", "greedy", "uniform")


class ModulePlan(Config):
    """Settings of one quantizer."""

    bits: int = 4
    """Planes, 1 to 8."""
    group_size: int = 128
    """Inputs that share their scales; more than a row means the whole row."""
    method: MethodName = "alternating"
    """`alternating` and `greedy` choose binary codes; `uniform` rounds to nearest."""
    rounds: int = 15
    """Rounds of alternation."""
    offset: bool = False
    """A constant per group beside the scales (`uniform` always has one)."""
    scale_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """How scales are stored."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits = {self.bits}; allowed: 1 to {MAX_BITS}")
        if self.group_size < 8:
            raise ValueError(f"group_size = {self.group_size}; must be at least 8")
        if self.rounds < 0:
            raise ValueError(f"rounds = {self.rounds}; must be at least 0")
        return self

    def quantize(self, weight: Tensor) -> PackedWeight:
        """Quantizes one weight `[out, in]`."""
        dtype: torch.dtype = SCALE_DTYPES[self.scale_dtype]
        if self.method == "uniform":
            return quantize_uniform(weight, self.bits, self.group_size, dtype)
        return quantize(weight, self.bits, self.group_size, self.method, self.rounds, self.offset, dtype)


class PlanRule(Config):
    """Settings for modules whose name matches; the first match holds, and what it leaves out is the default's."""

    pattern: str
    """A shell pattern over module names, such as `*.down_proj` or `model.layers.0.*`."""
    keep: bool = False
    """Keep the weight as it is."""
    bits: int | None = None
    """Planes."""
    group_size: int | None = None
    """Inputs that share their scales."""
    method: MethodName | None = None
    """The quantizer."""


class CompressPlan(Config):
    """A compression of the linear layers of every block; embedding, output and norms are kept."""

    default: ModulePlan = ModulePlan()
    """Settings of every linear layer that no rule names."""
    rules: tuple[PlanRule, ...] = ()
    """Exceptions, first match first."""

    def module(self, stem: str) -> ModulePlan | None:
        """Settings of a module, or None if its weight is kept."""
        if not stem.startswith("model.layers."):
            return None
        rule = next((rule for rule in self.rules if fnmatchcase(stem, rule.pattern)), None)
        if rule is None:
            return self.default
        if rule.keep:
            return None
        changes = {
            name: value for name in ("bits", "group_size", "method") if (value := getattr(rule, name)) is not None
        }
        return ModulePlan.model_validate({**self.default.model_dump(), **changes})

    def check_rules(self, stems: list[str]) -> None:
        """Refuses a rule that names no module: it is a slip of the pen.

        Raises:
            ConfigError: naming the rule.
        """
        for number, rule in enumerate(self.rules):
            if not any(fnmatchcase(stem, rule.pattern) for stem in stems):
                raise ConfigError(
                    f"rules.{number}.pattern = {rule.pattern!r} matches no linear layer of the blocks; names look like "
                    f"{stems[0] if stems else 'model.layers.0.mlp.up_proj'!r} (embedding and output are kept)"
                )
