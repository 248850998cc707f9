"""What is compressed, and how: a default and ordered exceptions by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from hcx.compress.bcq import SCALE_DTYPES, quantize
from hcx.compress.uniform import quantize_uniform
from hcx.config import Config
from hcx.errors import ConfigError, did_you_mean
from hcx.kernels import PackedWeight
from hcx.kernels.format import MAX_BITS

MethodName = Literal["alternating", "greedy", "uniform"]
METHODS: tuple[MethodName, ...] = ("alternating", "greedy", "uniform")
ScaleName = Literal["fp16", "bf16", "fp32"]
MIN_GROUP = 8
"""Below this, scales take more room than the planes."""


def _within(low: int, high: int | None = None) -> AfterValidator:
    def check(value: int) -> int:
        if value < low or (high is not None and value > high):
            raise ValueError(f"allowed: {low} to {high}" if high is not None else f"must be at least {low}")
        return value

    return AfterValidator(check)


Bits = Annotated[int, _within(1, MAX_BITS)]
GroupSize = Annotated[int, _within(MIN_GROUP)]
Rounds = Annotated[int, _within(0)]


class ModulePlan(Config):
    """Settings of one quantizer."""

    bits: Bits = 4
    """Planes, 1 to 8."""
    group_size: GroupSize = 128
    """Inputs that share their scales; more than a row means the whole row."""
    method: MethodName = "alternating"
    """`alternating` and `greedy` choose binary codes; `uniform` rounds to nearest."""
    rounds: Rounds = 15
    """Rounds of alternation."""
    offset: bool = False
    """A constant per group beside the scales (`uniform` always has one)."""
    scale_dtype: ScaleName = "fp16"
    """How scales are stored."""

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
    scheme: str | None = None
    """The name of an entry of `schemes`; what the rule states beside it changes the scheme."""
    keep: bool = False
    """Keep the weight as it is."""
    bits: Bits | None = None
    """Planes."""
    group_size: GroupSize | None = None
    """Inputs that share their scales."""
    method: MethodName | None = None
    """The quantizer."""
    rounds: Rounds | None = None
    """Rounds of alternation."""
    offset: bool | None = None
    """A constant per group beside the scales."""
    scale_dtype: ScaleName | None = None
    """How scales are stored."""

    def changes(self) -> dict[str, object]:
        """What it states, by name."""
        return self.model_dump(exclude={"pattern", "keep", "scheme"}, exclude_none=True)

    @model_validator(mode="after")
    def _check_keep(self) -> Self:
        stated = [*(["scheme"] if self.scheme is not None else []), *self.changes()]
        if self.keep and stated:
            raise ValueError(f"keep: true beside {', '.join(stated)}; a kept weight has no settings")
        return self


class CompressPlan(Config):
    """A compression of the linear layers of every block; the norms are always kept."""

    schemes: dict[str, ModulePlan] = Field(default_factory=dict)
    """Settings by name, for rules to choose from."""
    default: ModulePlan = ModulePlan()
    """Settings of every linear layer that no rule names, and of what a rule without a scheme leaves out."""
    covers: Literal["all", "named"] = "all"
    """`named`: the rules must name every linear layer; one that they leave to the default is an error."""
    rules: tuple[PlanRule, ...] = ()
    """Exceptions, first match first."""
    embedding: ModulePlan | None = None
    """Settings of the token embedding, and of the output where they are tied; kept if absent."""
    output: ModulePlan | None = None
    """Settings of an output matrix of its own; kept if absent."""

    def module(self, stem: str) -> ModulePlan | None:
        """Settings of a module, or None if its weight is kept."""
        if stem == "model.embed_tokens":
            return self.embedding
        if stem == "lm_head":
            return self.output
        if not stem.startswith("model.layers."):
            return None
        rule = next((rule for rule in self.rules if fnmatchcase(stem, rule.pattern)), None)
        if rule is None:
            return self.default
        if rule.keep:
            return None
        base = self.default if rule.scheme is None else self.schemes[rule.scheme]
        return ModulePlan.model_validate({**base.model_dump(), **rule.changes()})

    def rule_of(self, stem: str) -> str:
        """What decides on a module: a rule's pattern (and its scheme), `default`, `embedding` or `output`."""
        if stem in ("model.embed_tokens", "lm_head"):
            return "embedding" if stem == "model.embed_tokens" else "output"
        rule = next((rule for rule in self.rules if fnmatchcase(stem, rule.pattern)), None)
        if rule is None:
            return "default"
        return rule.pattern if rule.scheme is None else f"{rule.pattern} ({rule.scheme})"

    @model_validator(mode="after")
    def _check_schemes(self) -> Self:
        for number, rule in enumerate(self.rules):
            if rule.scheme is not None and rule.scheme not in self.schemes:
                raise ValueError(
                    f"rules.{number}.scheme = {rule.scheme!r} is no entry of schemes; "
                    f"{did_you_mean(rule.scheme, self.schemes)}"
                )
        unused = sorted(set(self.schemes) - {rule.scheme for rule in self.rules})
        if unused:
            raise ValueError(f"schemes.{unused[0]} is used by no rule")
        return self

    def check_rules(self, stems: Sequence[str]) -> None:
        """Refuses a rule that changes nothing and, with `covers: named`, a layer without a rule: slips of the pen.

        Args:
            stems: the linear layers of the blocks.

        Raises:
            ConfigError: naming the rule, and whether it matches nothing or an earlier one takes all its modules; or
                naming the layer.
        """
        used: set[int] = set()
        for stem in stems:
            matching = [number for number, rule in enumerate(self.rules) if fnmatchcase(stem, rule.pattern)]
            used.update(matching[:1])
            if not matching and self.covers == "named":
                raise ConfigError(
                    f"covers: named, and no rule names {stem}; add one, or let the default have it with covers: all"
                )
        for number, rule in enumerate(self.rules):
            if number in used:
                continue
            where = f"rules.{number}.pattern = {rule.pattern!r}"
            if any(fnmatchcase(stem, rule.pattern) for stem in stems):
                raise ConfigError(
                    f"{where} has no effect: earlier rules take every module it names; put it before them"
                )
            ends = sorted({"*." + stem.rsplit(".", 1)[1] for stem in stems})
            raise ConfigError(
                f"{where} matches no linear layer of the blocks; {did_you_mean(rule.pattern, ends)} "
                "(embedding and output have keys of their own)"
            )
