"""Trained scales have autograd's gradients, change nothing at rest, and are split over ranks without communication."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hcx.compress.bcq import quantize
from hcx.compress.uniform import quantize_uniform
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight
from hcx.model.parts.base import PlainParts
from hcx.model.parts.linear import LinearPart
from hcx.model.parts.scales import RoutedSource, ScaledSource, local_packed
from hcx.model.parts.sources import BCQSource, LinearBlock

OUT, IN = 12, 40


def weight(seed: int = 0, rows: int = OUT, columns: int = IN) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def block(packed: PackedWeight, **changes: object) -> LinearBlock:
    shape = (packed.out_features, packed.in_features)
    values: dict = {
        "stem": "s",
        "global_shape": shape,
        "offset": (0, 0),
        "rows": (0, shape[0]),
        "in_features": shape[1],
        "split": "column",
        "tp_size": 1,
        **changes,
    }
    return LinearBlock(**values)


def scaled(packed: PackedWeight, train: str = "first", divide: bool = False) -> ScaledSource:
    return ScaledSource(packed, block(packed), packed.group_size, packed.num_groups, train, divide)  # type: ignore[arg-type]


def by_autograd(
    packed: PackedWeight, source: ScaledSource, x: Tensor, outer: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """dX and the scales' gradients through a dense weight that autograd sees."""
    groups = torch.arange(packed.in_features) // packed.group_size
    leaves = {
        name: value.detach().to(x.dtype).requires_grad_()
        for name, value in zip(source.names, source.trained(), strict=True)
    }
    dense = torch.zeros(packed.out_features, packed.in_features, dtype=x.dtype)
    for plane in range(packed.bits):
        scale = leaves.get(f"scales.{plane}", packed.scales[plane].to(x.dtype))
        dense = dense + packed.signs(x.dtype)[plane] * scale[:, groups]
    offset = leaves.get("offset", packed.offset)
    if offset is not None:
        dense = dense + offset.to(x.dtype)[:, groups]
    inputs = x.clone().requires_grad_()
    (inputs @ dense.t()).backward(outer)
    assert inputs.grad is not None
    return inputs.grad, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("train", ["first", "all", "offset", "first_and_offset"])
@pytest.mark.parametrize(("bits", "group_size"), [(1, 128), (2, 16), (3, 128), (4, 24)])
@pytest.mark.parametrize("batch", [(1, 1), (7, 3)])
def test_gradients_are_those_of_autograd_through_the_dense_weight(
    train: str, bits: int, group_size: int, batch: tuple[int, int]
) -> None:
    packed = quantize(weight(), bits, group_size, scale_dtype=torch.float32, offset=True)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        source = scaled(packed, train).to(dtype)
        x, outer = weight(1, batch[0] * batch[1], IN).view(*batch, IN).to(dtype), weight(2, *batch).to(dtype)[..., None]
        outer = outer * weight(3, 1, OUT)[0].to(dtype)
        inputs = x.clone().requires_grad_()
        source(inputs).backward(outer)
        dx, expected = by_autograd(packed, source, x, outer)
        assert inputs.grad is not None
        torch.testing.assert_close(inputs.grad, dx, rtol=tolerance, atol=tolerance * float(dx.abs().max()))
        assert set(expected) == set(source.names)
        for name, parameter in zip(source.names, source.trained(), strict=True):
            assert parameter.grad is not None
            size = float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], rtol=tolerance, atol=tolerance * size)


def test_a_uniform_weight_has_trainable_scales_too() -> None:
    packed = quantize_uniform(weight(), 3, 16, torch.float32)
    source = scaled(packed)
    x = weight(1, 5).requires_grad_()
    source(x).sum().backward()
    _, expected = by_autograd(packed, source, weight(1, 5), torch.ones(5, OUT))
    torch.testing.assert_close(source.trained()[0].grad, expected["scales.0"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [16, 128])
def test_untrained_scales_compute_the_packed_model_bit_for_bit(group_size: int, scale_dtype: torch.dtype) -> None:
    packed = quantize(weight(), 3, group_size, scale_dtype=scale_dtype)
    source = scaled(packed, "all")
    assert torch.equal(source.dense(source.trained(), torch.float32), packed.dequantize())
    x = weight(4, 6)
    from hcx.kernels.reference import ReferenceBackend

    assert torch.equal(source(x), ReferenceBackend().matmul(x, packed))


def test_the_published_division_by_the_group_size_is_nothing_to_adam_and_much_to_sgd() -> None:
    ends: dict[tuple[str, bool], Tensor] = {}
    packed = quantize(weight(), 2, 20, scale_dtype=torch.float32)
    for kind, divide in itertools.product(("adamw", "sgd"), (False, True)):
        source = scaled(packed, divide=divide)
        parameters = list(source.parameters())
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, lr=1e-3, eps=1e-16, weight_decay=0.0)
            if kind == "adamw"
            else torch.optim.SGD(parameters, lr=1e-4)
        )
        for step in range(50):
            optimizer.zero_grad()
            (source(weight(10 + step, 8)) - weight(100 + step, 8, OUT)).square().sum().backward()
            optimizer.step()
        ends[kind, divide] = parameters[0].detach() - packed.scales[0]
    assert float((ends["adamw", True] - ends["adamw", False]).norm() / ends["adamw", False].norm()) < 1e-4
    assert float(ends["sgd", True].norm()) < 0.2 * float(ends["sgd", False].norm())


@pytest.mark.parametrize("group_size", [10, 20, 128])
@pytest.mark.parametrize("split", ["column", "row"])
def test_parts_of_ranks_together_are_the_whole(group_size: int, split: str) -> None:
    packed = quantize(weight(), 2, group_size, scale_dtype=torch.float32, offset=True)
    dense, found = packed.dequantize(), []
    for rank in range(2):
        if split == "column":
            place = block(packed, offset=(rank * OUT // 2, 0), rows=(0, OUT // 2), tp_size=2)
        else:
            place = block(packed, offset=(0, rank * IN // 2), in_features=IN // 2, split="row", tp_size=2)
        local = local_packed(packed, place)
        found.append(local.dequantize())
        source = ScaledSource(local, place, packed.group_size, packed.num_groups)
        (canonical,) = source.canonical()["scales_0"]
        rows, groups = source.trained()[0].shape
        expected = packed.scales[0][canonical.offset[0] :, canonical.offset[1] :][:rows, :groups]
        assert torch.equal(source.trained()[0], expected)
        assert canonical.global_shape == (OUT, packed.num_groups)
        assert source.trained()[0].tp_partial_gradient == (split == "row" and group_size == 128)  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(found, 0 if split == "column" else 1), dense)


def test_a_group_that_ranks_would_share_is_refused() -> None:
    packed = quantize(weight(), 2, 16)
    with pytest.raises(ConfigError, match="groups of 16 inputs do not divide the 20 inputs"):
        local_packed(packed, block(packed, offset=(0, 20), in_features=20, split="row", tp_size=2))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("group_size", [16, 128])
@pytest.mark.parametrize("numerics", ["reference", "exact", "fast"])
def test_rows_of_a_batch_are_multiplied_with_their_own_tasks_scales(
    group_size: int, offset: bool, numerics: str
) -> None:
    stems = {"q": (OUT, IN), "k": (8, IN)}
    part = LinearPart(PlainParts(), stems, "column")
    plain = [quantize(weight(seed, *shape), 3, group_size, offset=offset) for seed, shape in enumerate(stems.values())]
    tasks = []
    for task in range(2):
        changed = []
        for number, packed in enumerate(plain):
            scales = packed.scales.float().clone()
            # Also negative and out of order, which training may make of them.
            scales[0] += 0.9 * weight(50 + 7 * task + number, *scales.shape[1:])
            changed.append(PackedWeight(packed.planes, scales, packed.offset, IN, packed.group_size))
        tasks.append(changed)
    source = RoutedSource(BCQSource(dict(zip(stems, plain, strict=True)), numerics), plain, tasks)
    part.replace_source(source)
    x = weight(9, 3 * 5).view(3, 5, IN)
    ids = torch.tensor([1, 0, 2, 2, 0])
    found = part(x, ids)
    tolerance = {"reference": 1e-5, "exact": 1e-3, "fast": 3e-2}[numerics]
    for row, number in enumerate(ids.tolist()):
        dense = torch.cat([w.dequantize() for w in (tasks[number - 1] if number else plain)])
        expected = x[:, row] @ dense.t()
        assert float((found[:, row] - expected).norm() / expected.norm()) < tolerance
        # Alone, the row computes what it computed in company.
        alone = part(x[:, row : row + 1], ids[row : row + 1])[:, 0]
        torch.testing.assert_close(alone, found[:, row], rtol=1e-5, atol=1e-5)
    assert torch.equal(part(x), source.base(x))
