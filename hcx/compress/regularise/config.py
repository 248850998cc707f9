"""What a recipe says about compression while training: how often, of what, by which rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hcx.compress.exceptions import without_effect
from hcx.compress.plan import Bits, GroupSize, Rounds, ScaleName
from hcx.config import Config
from hcx.errors import ConfigError

EMBEDDING, OUTPUT = "model.embed_tokens", "lm_head"


class WeightDecayRule(Config):
    """`w (1 - lr * strength)`, with the learning rate of the step."""

    kind: Literal["weight_decay"] = "weight_decay"
    strength: float = 0.1
    """Decay per event, in units of the learning rate."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strength < 0:
            raise ValueError(f"strength = {self.strength:g}; must not be negative")
        return self


class NoiseRule(Config):
    """Adds independent uniform noise between `-amplitude` and `amplitude`."""

    kind: Literal["noise"] = "noise"
    amplitude: float
    """In the weights' own unit."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.amplitude < 0:
            raise ValueError(f"amplitude = {self.amplitude:g}; must not be negative")
        return self


class PruneRule(Config):
    """Zeroes the smallest weights. No mask is kept: a zeroed weight is trained, and may grow until the next event."""

    kind: Literal["prune"] = "prune"
    fraction: float = 0.8
    """Share of the weights that is zeroed, at the end of the ramp."""
    scope: Literal["tensor", "global"] = "tensor"
    """One threshold per weight, or one over all weights with this rule."""
    initial_fraction: float = 0.0
    """Share at the start of the ramp."""
    ramp_steps: int = 0
    """Steps over which the share rises along a cubic (Zhu & Gupta 2017, equation 1); 0: no ramp."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.initial_fraction <= self.fraction < 1:
            raise ValueError(
                f"initial_fraction = {self.initial_fraction:g}, fraction = {self.fraction:g}; must hold 0 <= "
                "initial_fraction <= fraction < 1"
            )
        if self.ramp_steps < 0:
            raise ValueError(f"ramp_steps = {self.ramp_steps}; must not be negative")
        return self

    def fraction_at(self, step: int, last: bool) -> float:
        """The share after `step` steps since the end of the warm-up."""
        if last or step >= self.ramp_steps:
            return self.fraction
        rest = 1.0 - max(0, step) / self.ramp_steps
        return self.fraction + (self.initial_fraction - self.fraction) * rest**3


class LowRankRule(Config):
    """The nearest matrix of a rank, tile by tile."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = 32
    """Rank of each tile, at the end of the ramp."""
    tile: tuple[int, int] | None = None
    """Rows and columns of a tile; those at the edges may be smaller. The whole matrix if not given."""
    initial_rank: int | None = None
    """Rank at the start of the ramp; the full one if not given."""
    ramp_steps: int = 0
    """Steps over which the rank falls along a cubic; 0: no ramp."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rank < 1 or (self.tile is not None and min(self.tile) < 1):
            raise ValueError(f"rank = {self.rank}, tile = {self.tile}; must be at least 1")
        if self.initial_rank is not None and self.initial_rank < self.rank:
            raise ValueError(f"initial_rank = {self.initial_rank}; must be at least rank = {self.rank}")
        if self.ramp_steps < 0:
            raise ValueError(f"ramp_steps = {self.ramp_steps}; must not be negative")
        return self

    def tile_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """Size of a whole tile of a weight."""
        rows, columns = self.tile or (shape[0], shape[1])
        return min(rows, shape[0]), min(columns, shape[1])

    def rank_at(self, step: int, last: bool, full: int) -> int:
        """The rank after `step` steps since the end of the warm-up, of tiles whose full rank is `full`."""
        if last or step >= self.ramp_steps:
            return self.rank
        start = min(full, self.initial_rank or full)
        rest = 1.0 - max(0, step) / self.ramp_steps
        return max(self.rank, round(self.rank + (start - self.rank) * rest**3))


class BCQRule(Config):
    """Binary codes; the planes of the last event are the model that is written."""

    kind: Literal["bcq"] = "bcq"
    bits: Bits = 3
    """Planes."""
    group_size: GroupSize = 128
    """Inputs that share their scales; more than a row means the whole row."""
    method: Literal["alternating", "greedy"] = "alternating"
    """How codes are found."""
    rounds: Rounds = 3
    """Rounds of alternation at an event."""
    final_rounds: Rounds = 15
    """Rounds of alternation at the last event."""
    offset: bool = False
    """A constant per group beside the scales."""
    scale_dtype: ScaleName = "fp16"
    """How scales are stored; the weights after an event are sums of scales as stored."""


class UniformRule(Config):
    """Rounding to nearest on a uniform grid per group; written as planes with an offset."""

    kind: Literal["uniform"] = "uniform"
    bits: Bits = 4
    """Bits per code."""
    group_size: GroupSize = 128
    """Inputs that share a grid."""


AnyRule = Annotated[
    WeightDecayRule | NoiseRule | PruneRule | LowRankRule | BCQRule | UniformRule, Field(discriminator="kind")
]
PACKED_RULES = (BCQRule, UniformRule)
"""Rules whose result has planes."""


class RegulariseException(Config):
    """Another rule for modules whose name matches; the first match holds."""

    pattern: str
    """A shell pattern over module names, such as `*.down_proj` or `model.layers.0.*`."""
    keep: bool = False
    """Leave the weight alone."""
    rule: AnyRule | None = None
    """What is done to it instead."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep == (self.rule is not None):
            raise ValueError("give either keep: true or a rule")
        return self


class RegulariseConfig(Config):
    """Replaces the fp32 masters by their compressed version every `period` optimizer steps, and after the last one.

    Lee et al. 2021 (arXiv 2105.01875), whose non-regularisation period pNR is `period`; how often is the strength.
    """

    method: Literal["period", "straight_through"] = "period"
    """`straight_through`: no events but the last; every forward computes with the compressed weight, and the gradient
    passes to the latent one (quantization-aware training, for comparison; `bcq` and `uniform` only)."""
    period: int | Literal["lr_scaled"] = 64
    """Optimizer steps from event to event; 1 is compression at every step. `lr_scaled`: in proportion to 1 / learning
    rate, so that weights move about as far between events all along."""
    base_period: int = 64
    """With `lr_scaled`: steps from event to event at the peak learning rate."""
    warmup_steps: int | None = None
    """No event in these first steps; the learning rate's warm-up if not given."""
    default: AnyRule = BCQRule()
    """What is done to every linear layer of the blocks that no exception names."""
    exceptions: tuple[RegulariseException, ...] = ()
    """Other rules by name, first match first."""
    embedding: AnyRule | None = None
    """What is done to the token embedding, and to the output where they are tied; nothing if absent."""
    output: AnyRule | None = None
    """What is done to an output matrix of its own; nothing if absent."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("period", "base_period"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} = {value}; must be at least 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps = {self.warmup_steps}; must not be negative")
        return self

    def rule(self, stem: str) -> AnyRule | None:
        """What is done to a module's weight; None: nothing."""
        if stem == EMBEDDING:
            return self.embedding
        if stem == OUTPUT:
            return self.output
        if not stem.startswith("model.layers.") or not stem.endswith("_proj"):
            return None
        found = next((item for item in self.exceptions if fnmatchcase(stem, item.pattern)), None)
        return self.default if found is None else found.rule

    def rules(self, stems: Sequence[str]) -> dict[str, AnyRule]:
        """Module -> what is done to it, without those that are left alone."""
        return {stem: rule for stem in stems if (rule := self.rule(stem)) is not None}

    @property
    def steps_between(self) -> int:
        """Steps from event to event, at the peak learning rate."""
        return self.base_period if self.period == "lr_scaled" else self.period


def check_plan(config: RegulariseConfig, shapes: Mapping[str, tuple[int, ...]], is_tied: bool) -> list[str]:
    """What is wrong with a plan for a model, one sentence per problem.

    Args:
        config: the recipe's section.
        shapes: module -> shape of its weight, of every matrix of the model.
        is_tied: whether the output is the embedding.
    """
    problems = []
    if config.output is not None and is_tied:
        problems.append(
            "regularise.output: this model's output is its embedding (model.tie_embeddings = true), and one weight "
            "cannot have two rules; set regularise.embedding instead, which holds for both"
        )
    linears = [stem for stem in shapes if stem.startswith("model.layers.")]
    problems += without_effect("regularise", [item.pattern for item in config.exceptions], linears)
    chosen = config.rules(list(shapes))
    if not chosen:
        problems.append("regularise: every weight is left alone; give a rule, or remove the section")
    seen: set[str] = set()
    for stem, rule in chosen.items():
        problem = _rule_problem(config, rule, shapes[stem])
        if problem is not None and problem not in seen:
            seen.add(problem)
            problems.append(f"regularise: {stem}: {problem}")
    return problems


def _rule_problem(config: RegulariseConfig, rule: AnyRule, shape: tuple[int, ...]) -> str | None:
    if config.method == "straight_through" and not isinstance(rule, PACKED_RULES):
        return f"kind = {rule.kind} with method = straight_through, which knows bcq and uniform; use method: period"
    if isinstance(rule, LowRankRule):
        rows, columns = rule.tile_of(shape)
        # rank (m + n) numbers instead of m n.
        if rule.rank * (rows + columns) >= rows * columns:
            most = (rows * columns - 1) // (rows + columns)
            return (
                f"rank = {rule.rank} of tiles of {rows} x {columns} stores more numbers than the tile; at most {most}"
            )
    return None


def require_plan(config: RegulariseConfig, shapes: Mapping[str, tuple[int, ...]], is_tied: bool) -> None:
    """Raises ConfigError with everything that `check_plan` finds."""
    problems = check_plan(config, shapes, is_tied)
    if problems:
        raise ConfigError("; ".join(problems))
