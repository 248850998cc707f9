"""The choice of a backend: priority, classes of numerics, refusals, the one override; and the reference product."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import PackedWeight, Spec, backends, registry, select
from hcx.kernels.format import pack_signs
from hcx.kernels.reference import ReferenceBackend


@dataclass
class Fake:
    """A backend that can do what it is told."""

    name: str
    numerics: str = "fast"
    reason: str | None = None
    device: str = "any"

    def why_not(self, spec: Spec) -> str | None:
        return self.reason

    def prepack(self, weight: PackedWeight) -> PackedWeight:
        return weight

    def matmul(self, x: Tensor, packed: PackedWeight) -> Tensor:
        return x

    def matmul_shared(self, x: Tensor, packed: Sequence[PackedWeight]) -> Tensor:
        return x


def spec(numerics: str = "fast") -> Spec:
    return Spec("cpu", 8, 16, 2, 8, numerics=numerics)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCX_KERNEL", raising=False)
    monkeypatch.setattr(registry, "_reported", set())


def test_the_first_that_can_is_taken() -> None:
    assert select(spec(), among=[Fake("one"), Fake("two")]).name == "one"
    assert select(spec(), among=[Fake("one", reason="no AVX-512"), Fake("two")]).name == "two"


@pytest.mark.parametrize(
    ("numerics", "expected"), [("fast", "tables8"), ("exact", "tables15"), ("reference", "reference")]
)
def test_the_choice_never_goes_below_the_class_asked_for(numerics: str, expected: str) -> None:
    candidates = [Fake("tables8", "fast"), Fake("tables15", "exact"), ReferenceBackend()]
    assert select(spec(numerics), among=candidates).name == expected


def test_falling_back_is_said_once_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    candidates = [Fake("one", reason="groups of 8 are too small"), ReferenceBackend()]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            select(spec(), among=candidates)
    assert [record.getMessage() for record in caplog.records] == [
        "kernel one is not used: groups of 8 are too small; taking reference"
    ]


def test_kernels_of_another_device_or_a_lower_class_are_not_reported_as_missed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    elsewhere = Fake("tensor cores", "reference", "the weight is on the CPU", device="cuda")
    with caplog.at_level(logging.WARNING):
        chosen = select(spec("reference"), among=[elsewhere, Fake("tables8", "fast"), ReferenceBackend()])
    assert chosen.name == "reference"
    assert not caplog.records


def test_a_named_kernel_is_honoured_or_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [Fake("one"), Fake("two"), Fake("broken", reason="needs a GPU")]
    assert select(spec(), "two", candidates).name == "two"
    with pytest.raises(KernelError, match=r"'broken' cannot serve.*needs a GPU"):
        select(spec(), "broken", candidates)
    with pytest.raises(KernelError, match="below the requested 'reference'"):
        select(spec("reference"), "two", candidates)
    with pytest.raises(KernelError, match="'three' does not exist; valid: one, two, broken"):
        select(spec(), "three", candidates)
    monkeypatch.setenv("HCX_KERNEL", "two")
    assert select(spec(), among=candidates).name == "two"


def test_when_none_can_every_reason_is_given() -> None:
    with pytest.raises(KernelError, match=r"one: too old; two: its numerics are 'fast', below the requested 'exact'"):
        select(spec("exact"), among=[Fake("one", "exact", "too old"), Fake("two")])


def test_the_reference_comes_last_and_serves_everything() -> None:
    assert isinstance(backends()[-1], ReferenceBackend)
    assert ReferenceBackend().why_not(spec("reference")) is None


def test_an_unknown_class_of_numerics_is_refused() -> None:
    packed = PackedWeight(pack_signs(torch.ones(1, 2, 8, dtype=torch.bool)), torch.ones(1, 2, 1), None, 8, 8)
    with pytest.raises(KernelError, match="numerics = 'precise'; valid: fast, exact, reference"):
        Spec.of(packed, numerics="precise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_multiplies_exactly_where_sums_are_exact(dtype: torch.dtype) -> None:
    """Small integers and scales that are powers of two: every sum is exact, so any order must give the same bits."""
    generator = torch.Generator().manual_seed(0)
    positive = torch.rand(3, 5, 21, generator=generator) < 0.5
    scales = 2.0 ** -torch.arange(3.0)[:, None, None].expand(3, 5, 3).contiguous()
    scales[1, 2] *= -1
    packed = PackedWeight(pack_signs(positive), scales.half(), torch.full((5, 3), 0.5), 21, 9)
    x = torch.randint(-3, 4, (2, 4, 21), generator=generator).to(dtype)
    expected = torch.zeros(2, 4, 5, dtype=torch.float64)
    for column in range(21):
        where = column // 9
        weight = sum(scales[i, :, where].double() * (2.0 * positive[i, :, column] - 1) for i in range(3)) + 0.5
        expected += x[..., column, None].double() * weight
    found = ReferenceBackend().matmul(x, packed)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
