"""What a recipe says about dropped backward passes."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import model_validator

from hcx.config import Config


class DropBPConfig(Config):
    """Drops the backward pass of random residual sublayers (DropBP, Woo et al. 2024); the forward stays whole."""

    rate: float
    """Target share of backward work that is dropped: 0 to `cap`; the paper uses 0.5, 0.75 and 0.875."""
    mask_rule: Literal["exact", "reference", "bernoulli"] = "exact"
    """How a micro-batch's mask is drawn. `exact`: always equally many sublayers; `reference`: the published rule, which
    drops more than the rate and the first sublayers most; `bernoulli`: each sublayer by itself."""
    allocation: Literal["sensitivity", "flops_aware", "uniform"] = "sensitivity"
    """Rates of the sublayers after the probe. `sensitivity`: as published; `flops_aware`: sensitivity per operation, an
    experiment; `uniform`: no probe, the same rate for all."""
    sens_metric: Literal["norm_diff", "grad_diff"] = "norm_diff"
    """Sensitivity of a sublayer: `norm_diff`, the published code's difference of gradient norms, or `grad_diff`, the
    paper's norm of the difference, which keeps one more copy of the gradients during the probe."""
    probe_at: float = 0.1
    """When sensitivities are measured, as a share of the run's steps; until then all rates are equal."""
    probe_rows: int = 1
    """Rows of each replica's batch that the probe uses; it costs one backward per sublayer and one more."""
    floor: float = 0.0
    """The lowest rate that the allocation gives."""
    cap: float = 0.9
    """The highest rate that the allocation gives."""
    mechanism: Literal["no_grad", "detach"] = "no_grad"
    """How a branch is dropped: computed without a graph, or, as published, with one that is thrown away."""
    hold_steps: int = 1
    """Steps for which a micro-batch's mask stays. More than 1 spares ZeRO-3 the recording of a new order each time."""
    stages: int | None = None
    """Parts of the model that each drop equally many sublayers; the chunks of blocks of all pipeline stages if not
    given. Masks depend on it: a run that goes on with other pipeline stages keeps its masks when this is set."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("rate", "floor", "cap", "probe_at"):
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} = {value:g}; must be from 0 to 1")
        if self.rate == 1:
            raise ValueError("rate = 1 drops everything and trains nothing; use a rate below 1")
        if self.rate > self.cap:
            raise ValueError(
                f"rate = {self.rate:g} is above cap = {self.cap:g}: no allocation can drop so much; "
                f"use a rate of at most {self.cap:g}, or set cap"
            )
        if self.floor > self.rate:
            raise ValueError(f"floor = {self.floor:g} is above rate = {self.rate:g}; use a floor of at most the rate")
        for name in ("probe_rows", "hold_steps", "stages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}; must be at least 1")
        return self
