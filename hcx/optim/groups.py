"""Which learning rate, weight decay, update rule and clip group each parameter has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from hcx.optim.config import OptimConfig


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are updated alike.

    Attributes:
        names: canonical names, in the order given.
        update: the rule of the update.
        lr_mult: factor of `OptimConfig.lr`.
        weight_decay: decoupled weight decay.
        clip_group: whose norm clips them.
    """

    names: tuple[str, ...]
    update: Literal["adamw", "muon", "sgd"]
    lr_mult: float
    weight_decay: float
    clip_group: str


def parameter_groups(shapes: Mapping[str, tuple[int, ...]], config: OptimConfig) -> list[ParameterGroup]:
    """Groups parameters by what holds for them.

    Args:
        shapes: canonical name -> global shape, of the trained parameters.
        config: the recipe's settings.
    """
    members: dict[tuple, list[str]] = {}
    for name, shape in shapes.items():
        rule = next((rule for rule in config.rules if fnmatchcase(name, rule.pattern)), None)
        update = config.kind
        if update == "muon" and not _is_hidden_matrix(name, shape):
            update = "adamw"
        # Decay would pull scales towards a weight of zero, and FleXOR's keys to where every step flips their signs.
        decay = config.weight_decay if len(shape) > 1 and not _is_scale(name) else 0.0
        if rule is not None and rule.weight_decay is not None:
            decay = rule.weight_decay
        lr_mult = (1.0 if rule is None else rule.lr_mult) * (config.muon_lr_mult if update == "muon" else 1.0)
        lr_mult *= _width_factor(name, shape, config)
        clip_group = "default" if rule is None else rule.clip_group
        members.setdefault((update, lr_mult, decay, clip_group), []).append(name)
    return [ParameterGroup(tuple(names), *key) for key, names in members.items()]


def _width_factor(name: str, shape: tuple[int, ...], config: OptimConfig) -> float:
    """The learning rate's factor under muP (see `MuP`)."""
    if config.mup is None or len(shape) < 2:
        return 1.0
    factor = config.mup.base_width / config.mup.width
    return factor if _is_hidden_matrix(name, shape) else math.sqrt(factor)


def _is_hidden_matrix(name: str, shape: tuple[int, ...]) -> bool:
    # Between hidden spaces; embeddings and the output map one-hot vectors (Jordan et al. 2024 for Muon; muP likewise).
    return len(shape) == 2 and "embed_tokens" not in name and not name.startswith("lm_head") and not _is_scale(name)


def _is_scale(name: str) -> bool:
    # Scales and keys of coded weights: tables of numbers, not maps between spaces.
    return ".scales." in name or ".keys." in name or name.endswith(".offset")
