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


class MuP(Config):
    """Learning rates by width, so that those found at a small width hold at a large one (maximal update
    parametrization: Yang et al. 2022, Tensor Programs V, arXiv 2203.03466, table 3 in the equivalent form of appendix
    J.2.1, Adam).

    With `m = width / base_width`: matrices between hidden spaces learn at `1/m` of the rate, embedding and output at
    `1/sqrt(m)`, vectors at the whole rate. The model does the other half, by its multipliers: `initializer_range` and
    `logits_scaling` are those of the base times `1/sqrt(m)`, `embedding_multiplier` times `sqrt(m)`; depth and the size
    of a head stay (a head that grows needs `attention_multiplier` in proportion to `1/head_dim`).
    """

    width: int
    """`model.hidden_size`."""
    base_width: int
    """The width at which `lr` was found."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.width, self.base_width) < 1:
            raise ValueError("width and base_width must be at least 1")
        return self


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
    mup: MuP | None = None
    """Learning rates by width (adamw only), beside the model's multipliers; none: one rate for every width."""
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
        if self.mup is not None and self.kind != "adamw":
            raise ValueError(f"mup with kind = {self.kind}: its learning rates are those of adamw")
        return self
