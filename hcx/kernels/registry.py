"""Which backend multiplies a packed weight: a priority list per device, the reference last."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels.cpu import BiQGEMMBackend, DequantizeBackend, TableBackend
from hcx.kernels.format import PackedWeight
from hcx.kernels.lut_gpu import LutBackend
from hcx.kernels.reference import ReferenceBackend
from hcx.kernels.triton.backend import TritonBackend, TritonExactBackend

log = logging.getLogger(__name__)

NUMERICS = ("fast", "exact", "reference")
"""Classes of numerics, from the least to the most accurate."""


@dataclass(frozen=True)
class Spec:
    """What a product needs from a backend."""

    device: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    has_offset: bool = False
    numerics: str = "reference"

    @classmethod
    def of(cls, weight: PackedWeight, numerics: str = "reference") -> Spec:
        """The spec of a packed weight."""
        if numerics not in NUMERICS:
            raise KernelError(f"numerics = {numerics!r}; valid: {', '.join(NUMERICS)}")
        return cls(
            device=weight.planes.device.type,
            out_features=weight.out_features,
            in_features=weight.in_features,
            bits=weight.bits,
            group_size=weight.group_size,
            has_offset=weight.offset is not None,
            numerics=numerics,
        )


class Backend(Protocol):
    """One way to multiply."""

    name: str
    """Shown to users; `--kernel` and HCX_KERNEL take it."""
    numerics: str
    """The class that its results belong to."""
    device: str
    """Type of the device it works on, or `any`."""

    def why_not(self, spec: Spec) -> str | None:
        """Why it cannot serve a spec, in a sentence; None if it can."""
        ...

    def prepack(self, weight: PackedWeight) -> Any:
        """The weight as this backend wants it in memory, once after loading."""
        ...

    def matmul(self, x: Tensor, packed: Any) -> Tensor:
        """`[..., in] -> [..., out]`."""
        ...

    def matmul_shared(self, x: Tensor, packed: Sequence[Any]) -> Tensor:
        """The products of several weights with one input, concatenated: work on the input may be done once."""
        ...


_BACKENDS: list[Backend] = [
    TableBackend("cpu-fast", "fast", "fast"),
    TableBackend("cpu-exact", "exact", "tables15"),
    BiQGEMMBackend(),
    DequantizeBackend(),
    ReferenceBackend(),
]
_BY_NAME: list[Backend] = [TritonBackend(), TritonExactBackend(), LutBackend()]
"""Taken only when they are named: they compile and agree with the reference in emulation, but never ran on a GPU."""
_reported: set[tuple[str, str]] = set()


def backends() -> tuple[Backend, ...]:
    """The backends of the automatic choice in order of priority; the reference is last."""
    return tuple(_BACKENDS)


def backends_by_name() -> tuple[Backend, ...]:
    """The backends that only an explicit request takes."""
    return tuple(_BY_NAME)


def _is_enough(backend: Backend, spec: Spec) -> bool:
    return NUMERICS.index(backend.numerics) >= NUMERICS.index(spec.numerics)


def refusal(backend: Backend, spec: Spec) -> str | None:
    """Why a backend is not taken: its class is below the requested one, or its own reason."""
    if not _is_enough(backend, spec):
        return f"its numerics are {backend.numerics!r}, below the requested {spec.numerics!r}"
    return backend.why_not(spec)


def select(spec: Spec, kernel: str | None = None, among: Sequence[Backend] | None = None) -> Backend:
    """The first backend that can serve the spec and is not below its numerics class.

    Args:
        spec: what is needed.
        kernel: a backend by name; honoured or refused, never replaced. The environment variable HCX_KERNEL is the same.
        among: candidates in order of priority; the registered ones if not given.

    Raises:
        KernelError: the named backend does not exist or cannot, or none can; with every reason.
    """
    candidates = list(_BACKENDS if among is None else among)
    kernel = kernel or os.environ.get("HCX_KERNEL") or None
    if kernel is not None:
        known = candidates if among is not None else [*candidates, *_BY_NAME]
        named = [backend for backend in known if backend.name == kernel]
        if not named:
            raise KernelError(f"kernel {kernel!r} does not exist; valid: {', '.join(b.name for b in known)}")
        reason = refusal(named[0], spec)
        if reason is not None:
            raise KernelError(f"kernel {kernel!r} cannot serve {spec}: {reason}")
        return named[0]
    reasons: list[tuple[str, str]] = []
    missed: list[tuple[str, str]] = []
    for backend in candidates:
        reason = refusal(backend, spec)
        if reason is None:
            # A backend of another device or a lower class is not missed: only what could have served is reported.
            _report(missed, backend.name)
            return backend
        reasons.append((backend.name, reason))
        if backend.device in ("any", spec.device) and _is_enough(backend, spec):
            missed.append(reasons[-1])
    raise KernelError(f"no kernel can serve {spec}: " + "; ".join(f"{name}: {why}" for name, why in reasons))


def _report(missed: list[tuple[str, str]], taken: str) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, why in missed:
        if (name, why) not in _reported:
            _reported.add((name, why))
            by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        verb = "kernel %s is" if len(names) == 1 else "kernels %s are"
        log.warning(verb + " not used: %s; taking %s", ", ".join(names), why, taken)
