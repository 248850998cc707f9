"""What a recipe says about FleXOR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, Self

from pydantic import model_validator

from hcx.compress.exceptions import without_effect
from hcx.compress.flexor.network import MAX_IN
from hcx.config import Config
from hcx.kernels.gf2 import MAX_OUT

MAX_PROJECTED_IN = 12
"""Keys are found among all 2^n_in."""


class FlexorException(Config):
    """Another rate for modules whose name matches; the first match holds."""

    pattern: str
    """A shell pattern over module names, such as `*.down_proj` or `model.layers.0.*`."""
    keep: bool = False
    """Train the dense weight instead."""
    n_in: int | None = None
    """Stored bits of a slice."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep == (self.n_in is not None):
            raise ValueError("give either keep: true or n_in")
        return self


class FlexorConfig(Config):
    """Linear layers whose signs are expanded from fewer stored bits by a fixed network of XOR gates (arXiv 2009.04126).

    `planes * n_in / n_out` bits per weight, scales not counted.
    """

    n_in: int = 12
    """Stored bits of a slice."""
    n_out: int = 16
    """Weights of a slice; slices run along the inputs of a row."""
    planes: int = 1
    """Planes, each with a network of its own."""
    taps: int = 2
    """Inputs of every gate. An odd number has more codes at the same rate, and is harder to train."""
    group_size: int = 1 << 20
    """Inputs that share a scale per plane; more than a row means the whole row. Small groups cost more than they seem
    at such rates."""
    exceptions: tuple[FlexorException, ...] = ()
    """Other rates by name, first match first."""
    init: Literal["random", "project"] = "random"
    """`random`: keys near zero, scales of unit gain; `project`: the nearest code words of the weights that the run
    starts from (`n_in` up to 12)."""
    steepness: tuple[float, float] = (5.0, 10.0)
    """S of the backward's `tanh(S x)`, from the first step to the end of `steepness_steps`."""
    steepness_steps: int | None = None
    """Steps over which it rises; the learning rate's warm-up if not given."""
    clip_every: int = 0
    """Steps between clippings of the keys to +-2 / S, outside of which they get no gradient; 0: never."""
    encrypted: bool = False
    """Store the code words instead of the planes: smaller files; they are expanded at load."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for n_in in (self.n_in, *(item.n_in for item in self.exceptions if item.n_in is not None)):
            if not 1 <= self.taps <= n_in <= MAX_IN:
                raise ValueError(f"n_in = {n_in}, taps = {self.taps}; must hold 1 <= taps <= n_in <= {MAX_IN}")
            if self.init == "project" and n_in > MAX_PROJECTED_IN:
                raise ValueError(f"n_in = {n_in} with init: project, which tries every key; at most {MAX_PROJECTED_IN}")
            if self.n_out > MAX_OUT:
                raise ValueError(f"n_out = {self.n_out}: the stored network has at most {MAX_OUT} outputs")
            if n_in > self.n_out:
                raise ValueError(f"n_in = {n_in} stored bits for n_out = {self.n_out} weights; at most as many")
        if not 1 <= self.planes <= 8:
            raise ValueError(f"planes = {self.planes}; allowed: 1 to 8")
        if self.group_size < 1 or (self.group_size < 1 << 20 and self.group_size % self.n_out):
            raise ValueError(f"group_size = {self.group_size}: must be a multiple of n_out = {self.n_out}")
        if min(self.steepness) <= 0 or self.clip_every < 0 or (self.steepness_steps or 0) < 0:
            raise ValueError("steepness must be above 0; steepness_steps and clip_every must not be negative")
        return self

    def n_in_of(self, stem: str) -> int | None:
        """Stored bits per slice of a module; None: it stays dense."""
        if not stem.startswith("model.layers.") or not stem.endswith("_proj"):
            return None
        found = next((item for item in self.exceptions if fnmatchcase(stem, item.pattern)), None)
        return self.n_in if found is None else found.n_in

    def steepness_at(self, step: int, warmup_steps: int) -> float:
        """S in step `step`, counted from 0."""
        steps = warmup_steps if self.steepness_steps is None else self.steepness_steps
        share = 1.0 if steps == 0 else min(1.0, step / steps)
        return self.steepness[0] + (self.steepness[1] - self.steepness[0]) * share

    def bits_per_weight(self, shapes: Mapping[str, tuple[int, ...]]) -> float:
        """Stored bits per coded weight, without scales and without what an even number of taps saves."""
        bits = weights = 0
        for stem, (rows, columns) in shapes.items():
            n_in = self.n_in_of(stem)
            if n_in is not None:
                bits += self.planes * rows * -(-columns // self.n_out) * n_in
                weights += rows * columns
        return bits / weights if weights else 0.0


def check_flexor(config: FlexorConfig, stems: Sequence[str]) -> list[str]:
    """What is wrong with a section for a model with these matrices, one sentence per problem."""
    linears = [stem for stem in stems if stem.startswith("model.layers.")]
    problems = without_effect("flexor", [item.pattern for item in config.exceptions], linears)
    if not any(config.n_in_of(stem) for stem in linears):
        problems.append("flexor: every layer stays dense; give a rate, or remove the section")
    return problems
