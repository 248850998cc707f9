"""What is compressed, and how: a default and ordered exceptions by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, model_validator
from torch import Tensor

from hcx.compress.bcq import SCALE_DTYPES, quantize
from hcx.compress.clusters import Clusters
from hcx.compress.prune_plan import Pruning
from hcx.compress.uniform import quantize_uniform
from hcx.config import Config
from hcx.errors import ConfigError, did_you_mean
from hcx.kernels import PackedWeight
from hcx.kernels.format import MAX_BITS
from hcx.kernels.masked import EncodedWeight, MaskedWeight
from hcx.kernels.segmented import SegmentedWeight

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
    prune: Pruning | None = None
    """Prune first, and code what stays."""
    clusters: Clusters | None = None
    """Frequent rows of the embedding or the output get more planes than rare ones; `bits` is the largest number."""

    @model_validator(mode="after")
    def _check_prune(self) -> Self:
        special = [name for name in ("prune", "clusters") if getattr(self, name) is not None]
        if len(special) > 1:
            raise ValueError("prune and clusters do not go together")
        if self.prune is not None and (self.method != "alternating" or self.offset):
            raise ValueError("prune: pruned weights are coded with method: alternating and offset: false")
        return self

    def quantize(self, weight: Tensor) -> PackedWeight | MaskedWeight | EncodedWeight | SegmentedWeight:
        """Quantizes one weight `[out, in]`."""
        dtype: torch.dtype = SCALE_DTYPES[self.scale_dtype]
        if self.prune is not None:
            return self.prune.compress(weight, self.bits, self.group_size, self.rounds, dtype)
        if self.clusters is not None:
            return self.clusters.compress(weight, self.bits, self._quantize_rows)
        return self._quantize_rows(weight, self.bits)

    def _quantize_rows(self, weight: Tensor, bits: int) -> PackedWeight:
        dtype: torch.dtype = SCALE_DTYPES[self.scale_dtype]
        if self.method == "uniform":
            return quantize_uniform(weight, bits, self.group_size, dtype)
        return quantize(weight, bits, self.group_size, self.method, self.rounds, self.offset, dtype)


class PlanRule(Config):
    """Settings for modules whose name matches; the first match holds, and what it leaves out is the default's."""

    pattern: str
    """A shell pattern over module names, such as `*.down_proj` or `model.layers.0.*`."""
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
    prune: Pruning | None = None
    """Prune first, and code what stays."""

    def changes(self) -> dict[str, object]:
        """What it states, by name."""
        return self.model_dump(exclude={"pattern", "keep"}, exclude_none=True)

    @model_validator(mode="after")
    def _check_keep(self) -> Self:
        if self.keep and self.changes():
            raise ValueError(f"keep: true beside {', '.join(self.changes())}; a kept weight has no settings")
        return self


class CompressPlan(Config):
    """A compression of the linear layers of every block; the norms are always kept."""

    default: ModulePlan = ModulePlan()
    """Settings of every linear layer that no rule names."""
    rules: tuple[PlanRule, ...] = ()
    """Exceptions, first match first."""
    embedding: ModulePlan | None = None
    """Settings of the token embedding, and of the output where they are tied; kept if absent."""
    output: ModulePlan | None = None
    """Settings of an output matrix of its own; kept if absent."""

    @model_validator(mode="after")
    def _check_clusters(self) -> Self:
        if self.default.clusters is not None:
            raise ValueError("default.clusters: only embedding and output have rows that are tokens")
        return self

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
        return ModulePlan.model_validate({**self.default.model_dump(), **rule.changes()})

    def check_rules(self, stems: Sequence[str]) -> None:
        """Refuses a rule that changes nothing: it is a slip of the pen.

        Args:
            stems: the linear layers of the blocks.

        Raises:
            ConfigError: naming the rule, and whether it matches nothing or an earlier one takes all its modules.
        """
        used: set[int] = set()
        for stem in stems:
            matching = [number for number, rule in enumerate(self.rules) if fnmatchcase(stem, rule.pattern)]
            used.update(matching[:1])
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
