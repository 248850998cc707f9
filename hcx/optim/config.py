"""What a recipe says about the optimizer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from hcx.config import Config
from hcx.optim.schedule import Schedule


class GroupRule(Config):
    """Settings for parameters whose canonical name matches; the first rule that matches a name holds for it."""

    pattern: str
    """A shell pattern over canonical names, such as `*embed_tokens*`."""
    lr_mult: float = 1.0
    """Factor of the learning rate (muP, quantization scales)."""
    weight_decay: float | None = None
    """Decoupled weight decay; the default of its kind of parameter if not given."""
    clip_group: str = "default"
    """Parameters of one clip group share a gradient norm and are clipped together."""


class OptimConfig(Config):
    """Optimizer, learning rate and schedule."""

    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    """`muon` orthogonalises the updates of the blocks' matrices and uses AdamW for everything else."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Momentum of muon and sgd."""
    muon_lr_mult: float = 1.0
    """Factor of the learning rate for matrices under muon, whose updates are scaled to AdamW's size."""
    weight_decay: float = 0.1
    """Weight decay of matrices (decoupled, but for sgd); vectors have none unless a rule says so."""
    rules: tuple[GroupRule, ...] = ()
    """Exceptions by name, first match first."""
    schedule: Schedule = Schedule()
    """The learning rate over the steps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.lr > 0:
            raise ValueError(f"lr = {self.lr}; must be above 0")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise ValueError("betas and momentum must lie in [0, 1)")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError("eps must be above 0, weight_decay at least 0")
        return self
