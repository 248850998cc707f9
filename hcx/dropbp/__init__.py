"""Dropping the backward of residual sublayers while fine-tuning (DropBP, Woo et al. 2024, arXiv 2402.17812)."""

from hcx.dropbp.accounting import Saving, StepCosts, Trained
from hcx.dropbp.allocation import allocate
from hcx.dropbp.branches import SwitchedBranches, switched
from hcx.dropbp.config import DropBPConfig
from hcx.dropbp.masks import Mask, MaskSchedule, uneven_stages
from hcx.dropbp.sensitivity import measure_sensitivity
from hcx.dropbp.transform import DropBP

__all__ = [
    "DropBP",
    "DropBPConfig",
    "Mask",
    "MaskSchedule",
    "Saving",
    "StepCosts",
    "SwitchedBranches",
    "Trained",
    "allocate",
    "measure_sensitivity",
    "switched",
    "uneven_stages",
]
