"""The native backends: selection, operators and their gradients, shared inputs, weight sources."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import PackedWeight, Spec, backends, native, select
from hcx.kernels.ops import scaled_linear
from hcx.kernels.reference import ReferenceBackend
from hcx.model.parts.sources import BCQSource
from hcx.testing.packed import random_packed

pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")

FAST_ERROR, EXACT_ERROR = 1.2e-2, 1.5e-4
"""Relative errors of the classes, with room for short rows."""
FP32_ERROR = 1e-5
"""Two orders of summation in fp32."""
FIRST_DIFFERENCE = 2e-2
"""A difference quotient through 15-bit tables: their error divided by the step."""


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCX_KERNEL", raising=False)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize(
    ("numerics", "name"), [("fast", "cpu-fast"), ("exact", "cpu-exact"), ("reference", "cpu-dequantize")]
)
def test_the_class_asked_for_chooses_the_backend(numerics: str, name: str) -> None:
    assert select(Spec.of(random_packed(3, 8, 64, 32), numerics)).name == name


def test_an_unsupported_group_falls_back_and_says_why() -> None:
    spec = Spec.of(random_packed(3, 8, 64, 16), "fast")
    assert select(spec).name == "reference"
    with pytest.raises(KernelError, match="groups of 16 are not a multiple of 32"):
        select(spec, kernel="cpu-exact")
    with pytest.raises(KernelError, match="the weight is on cuda"):
        select(Spec("cuda", 8, 64, 3, 32, numerics="fast"), kernel="biqgemm")


@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
def test_every_backend_keeps_the_error_of_its_class(backend: object) -> None:
    weight = random_packed(3, 200, 576, 96)
    x = torch.randn(2, 3, 576, generator=torch.Generator().manual_seed(0))
    expected = ReferenceBackend().matmul(x, weight)
    limit = {"fast": FAST_ERROR, "exact": EXACT_ERROR, "reference": 0.0}[backend.numerics]
    prepared = backend.prepack(weight)
    assert relative(backend.matmul(x, prepared), expected) <= limit
    shared = backend.matmul_shared(x, [prepared, backend.prepack(random_packed(2, 30, 576, 96, seed=5))])
    assert torch.equal(shared[..., :200], backend.matmul(x, prepared))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_reference_gives_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    weight = random_packed(4, 70, 200, 64, dtype=torch.bfloat16)
    x = torch.randn(3, 200).to(dtype)
    backend = select(Spec.of(weight, "reference"))
    assert torch.equal(backend.matmul(x, backend.prepack(weight)), ReferenceBackend().matmul(x, weight))


def test_weights_of_one_input_that_disagree_on_groups_are_multiplied_apart() -> None:
    backend = select(Spec.of(random_packed(3, 8, 96, 32), "fast"))
    weights = [random_packed(3, 8, 96, 32), random_packed(2, 20, 96, 96)]
    prepared = [backend.prepack(weight) for weight in weights]
    x = torch.randn(4, 96)
    expected = torch.cat([backend.matmul(x, weight) for weight in prepared], dim=-1)
    assert torch.equal(backend.matmul_shared(x, prepared), expected)


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_a_source_with_several_stems_gives_what_each_stem_gives(numerics: str) -> None:
    packed = {"q": random_packed(3, 64, 128, 64), "k": random_packed(4, 32, 128, 64, seed=1)}
    x = torch.randn(5, 2, 128)
    whole = BCQSource(packed, numerics)
    assert whole.kernels == (f"cpu-{numerics}",) * 2
    alone = [BCQSource({stem: weight}, numerics)(x) for stem, weight in packed.items()]
    assert torch.equal(whole(x), torch.cat(alone, dim=-1))


@pytest.mark.parametrize("count", [1, 2])
def test_the_operators_pass_opcheck(count: int) -> None:
    weights = [native.pack(random_packed(3, 24, 96, 32, seed=seed)) for seed in range(count)]
    x = torch.randn(5, 96, requires_grad=True)
    arguments = (x, [weight.data for weight in weights], [24] * count, "tables15")
    torch.library.opcheck(torch.ops.hcx.bcq_matmul.default, arguments)
    torch.library.opcheck(torch.ops.hcx.bcq_dequantize.default, (weights[0].data, 24, 96))


def test_a_compiled_function_gives_the_same() -> None:
    backend = select(Spec.of(random_packed(3, 8, 64, 32), "exact"))
    weight = backend.prepack(random_packed(3, 8, 64, 32))
    x = torch.randn(3, 64)

    def twice(x: Tensor) -> Tensor:
        return backend.matmul(x, weight) * 2

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), twice(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_input_is_that_of_the_dense_product(dtype: torch.dtype) -> None:
    weights = [random_packed(3, 24, 80, 32), random_packed(2, 10, 80, 32, seed=1)]
    backend = select(Spec.of(weights[0], "fast"))
    x = torch.randn(2, 5, 80).to(dtype).requires_grad_()
    upstream = torch.randn(2, 5, 34).to(dtype)
    backend.matmul_shared(x, [backend.prepack(weight) for weight in weights]).backward(upstream)
    dense = torch.cat([weight.dequantize() for weight in weights])
    expected = (upstream.double() @ dense.double()).to(dtype)
    assert x.grad is not None
    assert relative(x.grad.float(), expected.float()) < (FP32_ERROR if dtype == torch.float32 else 4e-3)


def test_every_backend_gives_a_gradient_or_refuses() -> None:
    weight, upstream = random_packed(3, 24, 80, 32), torch.randn(5, 24)
    for backend in backends():
        x = torch.ones(5, 80, requires_grad=True)
        if backend.name == "biqgemm":
            with pytest.raises(KernelError, match="no gradients"):
                backend.matmul(x, backend.prepack(weight))
            continue
        backend.matmul(x, backend.prepack(weight)).backward(upstream)
        assert x.grad is not None
        assert relative(x.grad, upstream @ weight.dequantize()) < FP32_ERROR


def scaled(weight: PackedWeight, x: Tensor, scales: Tensor, offset: Tensor | None) -> Tensor:
    """The same by torch alone, from the formula of the format."""
    group = weight.group_size
    total = torch.zeros(weight.out_features, weight.in_features, dtype=torch.float64)
    for plane, scale in zip(weight.signs(torch.float64), scales, strict=True):
        total = total + plane * scale.repeat_interleave(group, 1)[:, : weight.in_features]
    if offset is not None:
        total = total + offset.repeat_interleave(group, 1)[:, : weight.in_features]
    return x @ total.t()


@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("group", [32, 75])
def test_gradients_of_scales_offsets_and_inputs_are_those_of_autograd(has_offset: bool, group: int) -> None:
    weight = random_packed(3, 20, 75, group, offset=has_offset, dtype=torch.float32)
    leaves = [torch.randn(4, 75), weight.scales * 1.5, *([weight.offset * 0.5] if weight.offset is not None else [])]
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = [leaf.double().requires_grad_() for leaf in leaves]
    upstream = torch.randn(4, 20)
    y = scaled_linear(ours[0], weight, native.pack(weight), ours[1], ours[2] if has_offset else None)
    expected = scaled(weight, theirs[0], theirs[1], theirs[2] if has_offset else None)
    assert relative(y, expected) < EXACT_ERROR  # the scales given, not those that it was packed with
    y.backward(upstream)
    expected.backward(upstream.double())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert relative(mine.grad, other.grad) < FP32_ERROR


def test_a_scale_gradient_is_the_slope_of_the_native_product() -> None:
    weight = random_packed(2, 4, 64, 32, offset=False, dtype=torch.float32)
    packed, x = native.pack(weight), torch.randn(3, 64)
    scales = weight.scales.clone().requires_grad_()
    scaled_linear(x, weight, packed, scales).sum().backward()
    moved = scales.detach().clone()
    moved[1, 2, 0] += 0.5
    with torch.no_grad():
        slope = (scaled_linear(x, weight, packed, moved) - scaled_linear(x, weight, packed, scales)).sum() / 0.5
    assert scales.grad is not None
    assert abs(float(slope - scales.grad[1, 2, 0])) < FIRST_DIFFERENCE


def test_scales_of_another_shape_are_refused() -> None:
    weight = random_packed(2, 4, 64, 32, offset=False)
    with pytest.raises(KernelError, match=r"scales \(2, 4, 3\), offset none: the weight has scales \(2, 4, 2\)"):
        scaled_linear(torch.ones(1, 64), weight, native.pack(weight), torch.ones(2, 4, 3))
