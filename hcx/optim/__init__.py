"""Optimizers, parameter groups, and schedules that are pure functions of the step."""

from hcx.optim.config import GroupRule, MuP, OptimConfig
from hcx.optim.groups import ParameterGroup, parameter_groups
from hcx.optim.schedule import Schedule, lr_factor
from hcx.optim.torch_optimizers import build_optimizers, impose, state_keys

__all__ = [
    "GroupRule",
    "MuP",
    "OptimConfig",
    "ParameterGroup",
    "Schedule",
    "build_optimizers",
    "impose",
    "lr_factor",
    "parameter_groups",
    "state_keys",
]
