"""A metric and how values of several ranks or micro-batches combine to one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reduce(Enum):
    """How values combine."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    LAST = "last"


@dataclass(frozen=True)
class Metric:
    """A value with its way of reduction; names are `area/name`, such as `train/loss`."""

    value: float
    reduce: Reduce = Reduce.LAST
