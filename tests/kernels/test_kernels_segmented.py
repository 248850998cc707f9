"""Rows with their own numbers of planes, in an order of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from hcx.errors import KernelError
from hcx.kernels import PackedWeight
from hcx.kernels.segmented import SegmentedWeight, read_segmented
from hcx.kernels.storage import stored_tensors
from hcx.testing.packed import random_packed

STEM = "model.embed_tokens"


def segmented(offset: bool = False, order: bool = True) -> SegmentedWeight:
    runs = tuple(random_packed(bits, rows, 20, 8, offset=offset, seed=rows) for rows, bits in ((3, 4), (6, 2), (12, 1)))
    shuffled = torch.randperm(21, generator=torch.Generator().manual_seed(0)).int()
    return SegmentedWeight(runs, shuffled if order else None)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_it_comes_back_and_is_served_as_an_ordinary_weight(offset: bool, order: bool) -> None:
    weight = segmented(offset, order)
    tensors, entry = load(save(weight.to_tensors(STEM))), json.loads(json.dumps(weight.describe()))
    expected = {f"{STEM}.{name}": shape for name, shape in stored_tensors(entry).items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == expected
    again = read_segmented(STEM, tensors, entry)
    dense = weight.dequantize()
    assert torch.equal(again.dequantize(), dense)
    served = PackedWeight.from_tensors(STEM, tensors, entry)
    assert served.bits == 4
    assert torch.equal(served.dequantize(), dense)  # a plane with a scale of zero changes no bit of the sum
    for place in range(21):  # by hand: where each stored row belongs
        run, first = next((r, f) for r, f in ((2, 9), (1, 3), (0, 0)) if place >= f)
        row = int(weight.row_order[place]) if weight.row_order is not None else place
        assert torch.equal(dense[row], weight.segments[run].dequantize()[place - first])
    assert weight.size_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert weight.code_bits == (3 * 4 + 6 * 2 + 12) / 21


def test_logits_of_permuted_rows_are_those_of_rows_in_order_exactly() -> None:
    # One sign per row in memory, so that the same kernel sees the same numbers, in another order.
    weight = segmented()
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(3))
    stored = torch.stack([x @ row for row in torch.cat([run.dequantize() for run in weight.segments])], 1)
    in_order = torch.stack([x @ row for row in weight.to_packed().dequantize()], 1)
    assert weight.row_order is not None
    assert torch.equal(torch.empty_like(stored).index_copy_(1, weight.row_order.long(), stored), in_order)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_segments": [{"rows": 3, "bits": 4}]}, "add up to 21"),
        ({"row_segments": [{"rows": 21, "bits": 9}]}, "bits from 1 to 8"),
        ({"row_segments": [{"rows": 21, "bits": 2}]}, "the row_segments need"),
        ({"row_segments": [{"bits": 2}]}, "damaged"),
        ({"row_segments": [1]}, "damaged"),
        ({"in_features": -1}, "must be positive"),
        ({"group_size": 0}, "must be positive"),
    ],
)
def test_a_damaged_entry_is_refused(change: dict[str, Any], message: str) -> None:
    weight = segmented()
    with pytest.raises(KernelError, match=f"^{STEM}: .*{message}"):
        read_segmented(STEM, weight.to_tensors(STEM), weight.describe() | change)


def test_damaged_tensors_are_refused() -> None:
    weight = segmented()
    tensors, entry = weight.to_tensors(STEM), weight.describe()
    order = tensors[f"{STEM}.row_order"].clone()
    order[0] = order[1]
    for change, message in (
        ({f"{STEM}.row_order": order}, "no permutation"),
        ({f"{STEM}.row_order": order.long()}, "no permutation"),
        ({f"{STEM}.planes": tensors[f"{STEM}.planes"][:-1]}, "bytes of planes"),
        ({f"{STEM}.scales": tensors[f"{STEM}.scales"].double()}, "allowed: fp16"),
    ):
        with pytest.raises(KernelError, match=message):
            read_segmented(STEM, tensors | change, entry)
    with pytest.raises(KernelError, match=r"row_order: missing"):
        read_segmented(STEM, {k: v for k, v in tensors.items() if "order" not in k}, entry)
    with pytest.raises(KernelError, match="only bits may differ"):
        SegmentedWeight((random_packed(2, 3, 20, 8), random_packed(2, 3, 20, 10)))
