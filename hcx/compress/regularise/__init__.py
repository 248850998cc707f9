"""Regularisation at a tunable frequency: masters are compressed every so many training steps (Lee et al. 2021)."""

from hcx.compress.regularise.config import RegulariseConfig, check_plan
from hcx.compress.regularise.planes import PlaneStore, write_packed_model
from hcx.compress.regularise.schedule import EventSchedule
from hcx.compress.regularise.transform import Regularise, matrix_shapes

__all__ = [
    "EventSchedule",
    "PlaneStore",
    "Regularise",
    "RegulariseConfig",
    "check_plan",
    "matrix_shapes",
    "write_packed_model",
]
