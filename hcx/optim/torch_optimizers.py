"""torch's own optimizers for parameter groups; every group knows its `ParameterGroup`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from hcx.optim.config import OptimConfig
from hcx.optim.groups import ParameterGroup

_KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",), "sgd": ("momentum_buffer",)}


def state_keys(group: ParameterGroup, config: OptimConfig) -> tuple[str, ...]:
    """Keys of the optimizer state of a parameter in this group."""
    if group.update == "sgd" and config.momentum == 0:
        return ()
    return _KEYS[group.update]


def build_optimizers(
    groups: Sequence[ParameterGroup],
    tensors: Callable[[ParameterGroup], Iterable[torch.Tensor]],
    config: OptimConfig,
) -> list[torch.optim.Optimizer]:
    """One optimizer per update rule in use.

    Args:
        groups: what is updated alike.
        tensors: the fp32 masters of a group.
        config: rates and constants.

    Returns:
        Optimizers whose `param_groups` carry their `ParameterGroup` under the key `hcx_group`.
    """
    optimizers = []
    for update in dict.fromkeys(group.update for group in groups):
        param_groups = [
            {"params": list(tensors(group)), "hcx_group": group, "weight_decay": group.weight_decay}
            for group in groups
            if group.update == update
        ]
        optimizers.append(_make(update, param_groups, config))
    return optimizers


def _make(update: str, param_groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    if update == "adamw":
        return torch.optim.AdamW(param_groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if update == "muon":
        # Updates get AdamW's typical root mean square (Liu et al. 2025), so both share one learning rate.
        return torch.optim.Muon(param_groups, lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
    return torch.optim.SGD(param_groups, lr=config.lr, momentum=config.momentum)


def impose(optimizer: torch.optim.Optimizer, config: OptimConfig, factor: float) -> None:
    """Sets learning rate and weight decay of every group for the coming step: libraries' loaders lose them."""
    for group in optimizer.param_groups:
        known: ParameterGroup = group["hcx_group"]
        group["lr"] = config.lr * known.lr_mult * factor
        group["weight_decay"] = known.weight_decay
