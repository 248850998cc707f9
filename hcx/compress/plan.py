"""What is compressed, and how: a default and ordered exceptions by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Literal, Self

import torch
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from hcx.compress.bcq import SCALE_DTYPES, quantize
from hcx.compress.clusters import Clusters
from hcx.compress.feedback import quantize_to_outputs
from hcx.compress.methods import GridOptions, find_method
from hcx.compress.nested import check_widths, quantize_nested, quantize_nested_to_outputs
from hcx.compress.prune_plan import Pruning
from hcx.compress.uniform import quantize_uniform, search_uniform
from hcx.config import Config
from hcx.errors import ConfigError, did_you_mean
from hcx.kernels import PackedWeight
from hcx.kernels.format import MAX_BITS
from hcx.kernels.masked import EncodedWeight, MaskedWeight
from hcx.kernels.segmented import SegmentedWeight

if TYPE_CHECKING:
    from hcx.compress.calibration import InputStatistics

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


def _known_method(name: str) -> str:
    try:
        find_method(name)
    except ConfigError as error:
        raise ValueError(str(error).partition(": " if ": say" in str(error) else "; ")[2]) from None
    return name


MethodName = Annotated[str, AfterValidator(_known_method)]


class ModulePlan(Config):
    """Settings of one quantizer."""

    bits: Bits = 4
    """Planes, 1 to 8."""
    group_size: GroupSize = 128
    """Inputs that share their scales; more than a row means the whole row."""
    method: MethodName = "alternating"
    """`alternating`, `refined` and `greedy` choose binary codes; `uniform` rounds to nearest on an even grid,
    `searched` on one whose range was searched."""
    rounds: Rounds = 15
    """Rounds of alternation."""
    offset: bool = False
    """A constant per group beside the scales (even grids always have one)."""
    scale_dtype: ScaleName = "fp16"
    """How scales are stored."""
    importance: bool = False
    """Weigh errors by the mean square of what each column reads (needs calibration text)."""
    feedback: bool = False
    """Make the error of the layer's outputs small instead of that of the weights: error feedback across columns, then
    `descent` (needs calibration text; `importance` is then implied)."""
    descent: Rounds = 4
    """With feedback: rounds of solving scales and choosing codes anew. `uniform` with 0 is GPTQ."""
    act_order: bool = True
    """With feedback: visit columns in the order of falling activation; they stay where they are stored."""
    widths: tuple[int, ...] = ()
    """Numbers of planes that one artifact is served with, such as [2, 3, 4], ending with `bits`; none: only `bits`."""
    prune: Pruning | None = None
    """Prune first, and code what stays."""
    clusters: Clusters | None = None
    """Frequent rows of the embedding or the output get more planes than rare ones; `bits` is the largest number."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.importance and not self.feedback and self.method == "uniform":
            raise ValueError("importance has no effect on uniform, whose grid spans every weight; use method: searched")
        if self.widths:
            try:
                check_widths(self.widths, self.bits, find_method(self.method))
            except ConfigError as error:
                raise ValueError(str(error)) from None
        special = [name for name in ("prune", "clusters", "widths") if getattr(self, name)]
        if len(special) > 1:
            raise ValueError(f"{' and '.join(special)} do not go together")
        weighed = self.importance or self.feedback
        if self.prune is not None and (self.method != "alternating" or self.offset or weighed):
            raise ValueError(
                "prune: pruned weights are coded with method: alternating, offset: false, and without importance and "
                "feedback"
            )
        return self

    @property
    def needs_statistics(self) -> bool:
        """Whether it reads what the layer reads."""
        return self.importance or self.feedback or (self.prune is not None and self.prune.needs_inputs)

    def quantize(
        self, weight: Tensor, statistics: InputStatistics | None = None
    ) -> PackedWeight | MaskedWeight | EncodedWeight | SegmentedWeight:
        """Quantizes one weight `[out, in]`.

        Args:
            weight: finite.
            statistics: of the layer's inputs; required by `importance`, `feedback` and two criteria of `prune`.

        Raises:
            ConfigError: the weight cannot be quantized like this, or statistics are missing.
        """
        if self.needs_statistics and statistics is None:
            raise ConfigError(
                "importance, feedback and prune.criterion activation or obs need calibration text, and statistics of "
                "the layer's inputs"
            )
        dtype: torch.dtype = SCALE_DTYPES[self.scale_dtype]
        if self.prune is not None:
            gram = None if statistics is None or not self.prune.needs_inputs else statistics.gram
            return self.prune.compress(weight, self.bits, self.group_size, self.rounds, dtype, gram)
        if self.clusters is not None:
            return self.clusters.compress(weight, self.bits, self._quantize_rows)
        return self._quantize_rows(weight, self.bits, statistics)

    def _quantize_rows(self, weight: Tensor, bits: int, statistics: InputStatistics | None = None) -> PackedWeight:
        dtype: torch.dtype = SCALE_DTYPES[self.scale_dtype]
        method = find_method(self.method)
        options = GridOptions(bits, self.rounds, self.offset, dtype)
        if self.feedback and statistics is not None:
            gram, size = statistics.gram, self.group_size
            if self.widths:
                return quantize_nested_to_outputs(
                    weight, gram, self.widths, method, options, size, self.descent, self.act_order
                )
            return quantize_to_outputs(weight, gram, method, options, size, self.descent, self.act_order)
        importance = statistics.moments if self.importance and statistics is not None else None
        if self.widths:
            return quantize_nested(weight, self.widths, method, options, self.group_size, importance)
        if self.method == "uniform":
            return quantize_uniform(weight, bits, self.group_size, dtype)
        if self.method == "searched":
            return search_uniform(weight, bits, self.group_size, dtype, importance)
        return quantize(
            weight,
            bits,
            self.group_size,
            self.method,  # type: ignore[arg-type] # the validator knows the names
            self.rounds,
            self.offset,
            dtype,
            importance,
        )


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
    importance: bool | None = None
    """Weigh errors by what each column reads."""
    feedback: bool | None = None
    """Make the error of the layer's outputs small."""
    descent: Rounds | None = None
    """Rounds of solving scales and choosing codes anew."""
    act_order: bool | None = None
    """Visit columns in the order of falling activation."""
    widths: tuple[int, ...] | None = None
    """Numbers of planes that one artifact can be served with."""
    prune: Pruning | None = None
    """Prune first, and code what stays."""

    def changes(self) -> dict[str, object]:
        """What it states, by name."""
        return self.model_dump(exclude={"pattern", "keep", "scheme"}, exclude_none=True)

    @model_validator(mode="after")
    def _check_keep(self) -> Self:
        stated = [*(["scheme"] if self.scheme is not None else []), *self.changes()]
        if self.keep and stated:
            raise ValueError(f"keep: true beside {', '.join(stated)}; a kept weight has no settings")
        return self


class Calibration(Config):
    """The text that activation-aware methods read, and what is done with it beside choosing codes."""

    tokens: Annotated[int, _within(1)] = 131_072
    """Tokens in all. More than a layer has inputs, by far, or its Gram matrix is mostly noise."""
    seq_len: Annotated[int, _within(2)] = 512
    """Tokens per row; at most the model's context."""
    shares: dict[str, float] = Field(default_factory=dict)
    """Language -> share of the tokens; those of the shards, or equal ones, if not given."""
    texts: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Language -> UTF-8 files to read instead of shards."""
    scaling: bool = False
    """Search scales per input channel first and fold them into what comes before (AWQ)."""
    seed: int = 0
    """Orders the documents of shards."""

    @field_validator("shares")
    @classmethod
    def _check_shares(cls, value: dict[str, float]) -> dict[str, float]:
        for language, share in value.items():
            if not 0 <= share < float("inf"):
                raise ValueError(f"the share of {language} is {share}; must be at least 0")
        return value


class SearchPlan(Config):
    """Clip and rounding of every layer chosen by the task loss (in the style of Q-Rater); grids are even."""

    rounds: Annotated[int, _within(1)] = 2
    """Over all knobs of a layer; two rounds are 89 evaluations of the loss for each layer, 75 without `feedback`."""
    sampler: Literal["coordinate", "random", "tpe"] = "coordinate"
    """Coordinate descent over the grids, or as many evaluations by one of optuna's samplers."""
    objective: Literal["divergence", "loss"] = "divergence"
    """`loss`: of the next token. `divergence`: from the full-precision model's predictions, which is what the loss
    rises by on text like the model's own, and needs far less text to tell two settings apart."""
    feedback: bool = True
    """Columns make up for the errors of those before them, with a damping that is searched, too."""
    start: Literal["least_squares", "rounding"] = "least_squares"
    """Where each layer's search begins: at its clip of least squared error, or at plain rounding."""
    slack: Annotated[float, Field(ge=0)] = 0.02
    """Nats per token by which a winner may be worse than the one before it in any one language."""
    noise: Annotated[float, Field(ge=0)] = 2.0
    """Standard errors, paired by row, by which a winner must be better: the best of many settings on little text is
    else often the luckiest."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the calibration text that no search sees; the choice at the end is made on it."""
    seed: int = 0
    """Of the samplers."""


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
    calibration: Calibration = Calibration()
    """What activation-aware methods read."""
    search: SearchPlan | None = None
    """Search clip and rounding by the task loss; `method: uniform` only."""

    @model_validator(mode="after")
    def _check_rules_with_default(self) -> Self:
        for number, rule in enumerate(self.rules):
            if rule.keep:
                continue
            try:
                self._merged(rule)
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"rules.{number} with what it takes from the default: {reason}") from None
        return self

    def _merged(self, rule: PlanRule) -> ModulePlan:
        base = self.default if rule.scheme is None else self.schemes.get(rule.scheme, self.default)
        return ModulePlan.model_validate({**base.model_dump(), **rule.changes()})

    @model_validator(mode="after")
    def _check_statistics(self) -> Self:
        if self.search is not None:
            stated: list[ModulePlan | PlanRule] = [self.default, *(rule for rule in self.rules if not rule.keep)]
            if any(one.method not in ("uniform", None) or one.feedback or one.widths for one in stated):
                raise ValueError("search: chooses clip and rounding of even grids; set method: uniform, no other")
            if any(one.scale_dtype not in ("fp16", None) for one in stated):
                raise ValueError("search: steps are stored as fp16; leave scale_dtype")
            if self.embedding is not None or self.output is not None or self.calibration.scaling:
                raise ValueError(
                    "search: is for the linear layers of the blocks as they are; leave out embedding, "
                    "output and calibration.scaling"
                )
        for name, settings in (("embedding", self.embedding), ("output", self.output)):
            if settings is not None and settings.needs_statistics:
                raise ValueError(f"{name}: importance and feedback are for the linear layers of the blocks only")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is read at all."""
        by_rule = any(
            rule.importance or rule.feedback or (rule.prune is not None and rule.prune.needs_inputs)
            for rule in self.rules
        )
        return self.search is not None or self.calibration.scaling or self.default.needs_statistics or by_rule

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
        return self._merged(rule)

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
