"""Binary-coded weights: the packed format, the reference product, and the choice of a backend."""

from hcx.kernels.format import PackedWeight
from hcx.kernels.registry import NUMERICS, Backend, Spec, backends, select

__all__ = ["NUMERICS", "Backend", "PackedWeight", "Spec", "backends", "select"]
