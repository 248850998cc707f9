"""The packed format: golden bytes, an independent decoder, round trips, refusals."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save

from hcx.errors import KernelError
from hcx.kernels import PackedWeight
from hcx.kernels.format import pack_signs

GOLDEN = Path(__file__).parent / "golden_8x16.safetensors"
STEM = "model.layers.0.mlp.up_proj"


def golden_weight() -> PackedWeight:
    """The worked example of kernels/FORMAT.md: 8 x 16, 2 planes, groups of 6 (the last one is short), with offset."""
    rows, columns, bits, group = torch.arange(8), torch.arange(16), torch.arange(2), torch.arange(3)
    positive = (37 * rows[None, :, None] + 11 * columns[None, None, :] + 5 * bits[:, None, None]) % 7 < 3
    scales = (1 + rows[None, :, None] / 8 + group[None, None, :] / 4) / 2.0 ** bits[:, None, None]
    scales[1, 3] *= -1  # negative scales are legal
    offset = (rows[:, None] - 4) / 16 + group[None, :] / 32
    return PackedWeight(pack_signs(positive), scales.half(), offset.float(), in_features=16, group_size=6)


def tensors_by_hand(data: bytes) -> dict[str, tuple[dict, bytes]]:
    """Header entry and bytes of each tensor of a safetensors container, by the last part of its name."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    return {
        name.removeprefix(STEM + "."): (entry, data[8 + length :][slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name.startswith(STEM)
    }


def decode_by_hand(data: bytes, entry: dict) -> list[list[float]]:
    """A second decoder, from the words of FORMAT.md alone: no torch, no numpy, nothing of hcx."""
    tensors = tensors_by_hand(data)
    bits, rows, columns, group = (entry[key] for key in ("bits", "out_features", "in_features", "group_size"))
    stride, groups = -(-columns // 8), -(-columns // group)
    planes = tensors["planes"][1]
    scales = scales_by_hand(tensors["scales"][1], entry["scale_dtype"])
    count = rows * groups
    offsets = struct.unpack(f"<{count}f", tensors["offset"][1]) if entry["offset"] else [0.0] * count
    assert tensors["planes"][0]["shape"] == [bits, rows, stride]
    assert tensors["scales"][0]["shape"] == [bits, rows, groups]
    dense = []
    for row in range(rows):
        values = []
        for column in range(columns):
            value = offsets[row * groups + column // group]
            for plane in range(bits):
                byte = planes[(plane * rows + row) * stride + column // 8]
                sign = 1 if byte >> (column % 8) & 1 else -1
                value += sign * scales[(plane * rows + row) * groups + column // group]
            values.append(value)
        dense.append(values)
    return dense


def scales_by_hand(data: bytes, dtype: str) -> list[float]:
    if dtype == "bf16":  # the upper half of an fp32
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    letter, size = {"fp16": ("e", 2), "fp32": ("f", 4)}[dtype]
    return list(struct.unpack(f"<{len(data) // size}{letter}", data))


def test_the_golden_bytes_are_what_is_written() -> None:
    written, golden = tensors_by_hand(save(golden_weight().to_tensors(STEM))), tensors_by_hand(GOLDEN.read_bytes())
    assert list(golden) == list(written)
    for name, (entry, data) in golden.items():
        assert written[name][1] == data
        assert (written[name][0]["dtype"], written[name][0]["shape"]) == (entry["dtype"], entry["shape"])


def test_the_bytes_of_the_format_page_are_those_of_the_golden_file() -> None:
    page = (Path(__file__).parents[2] / "kernels" / "FORMAT.md").read_text(encoding="utf-8")
    rows = [line.split()[2:] for line in page.splitlines() if line.strip().startswith(("plane 0 ", "plane 1 "))]
    assert (
        bytes.fromhex("".join(byte for row in rows for byte in row))
        == tensors_by_hand(GOLDEN.read_bytes())["planes"][1]
    )


def test_a_second_decoder_reads_the_golden_file_to_the_same_weights() -> None:
    by_hand = decode_by_hand(GOLDEN.read_bytes(), golden_weight().describe())
    packed = PackedWeight.from_tensors(STEM, load_file(GOLDEN), golden_weight().describe())
    # Every number of the example is a short binary fraction: sums are exact.
    assert packed.dequantize().tolist() == by_hand
    assert (by_hand[0][0], by_hand[0][1], by_hand[0][6]) == (0.25, -0.75, -0.84375)
    assert (by_hand[0][12], by_hand[3][0]) == (-2.4375, -0.75)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    group=st.integers(1, 80),
    offset=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_tensors_and_entry_give_back_every_byte(
    bits: int, rows: int, columns: int, group: int, offset: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(bits, rows, columns, generator=generator) < 0.5
    groups = -(-columns // group)
    packed = PackedWeight(
        pack_signs(positive),
        torch.randn(bits, rows, groups, generator=generator).to(dtype),
        torch.randn(rows, groups, generator=generator) if offset else None,
        columns,
        group,
    )
    assert torch.equal(packed.signs() > 0, positive)
    entry = json.loads(json.dumps(packed.describe()))
    data = save(packed.to_tensors(STEM))
    back = PackedWeight.from_tensors(STEM, load(data), entry)
    assert save(back.to_tensors(STEM)) == data
    assert back.describe() == entry
    assert torch.equal(pack_signs(back.signs() > 0), packed.planes)
    by_hand = torch.tensor(decode_by_hand(data, entry))
    torch.testing.assert_close(packed.dequantize(), by_hand, rtol=1e-5, atol=1e-5)


def test_pad_bits_are_zero() -> None:
    packed = pack_signs(torch.ones(1, 3, 13, dtype=torch.bool))
    assert packed[0, :, 1].tolist() == [0b00011111] * 3


@pytest.mark.parametrize("option", ["in_order", "encoding", "activation_ranges", "mask"])
def test_an_option_this_version_lacks_is_refused_by_name(option: str) -> None:
    packed = golden_weight()
    entry = packed.describe() | {option: [1]}
    with pytest.raises(KernelError, match=f"{option}.*not supported"):
        PackedWeight.from_tensors(STEM, packed.to_tensors(STEM), entry)


def test_damage_is_named() -> None:
    packed = golden_weight()
    tensors, entry = packed.to_tensors(STEM), packed.describe()
    with pytest.raises(KernelError, match=r"up_proj\.scales: missing"):
        PackedWeight.from_tensors(STEM, {k: v for k, v in tensors.items() if "scales" not in k}, entry)
    with pytest.raises(KernelError, match="bytes per row"):
        PackedWeight.from_tensors(STEM, tensors, entry | {"in_features": 17})
    with pytest.raises(KernelError, match=r"2 planes in the file, bits = 3"):
        PackedWeight.from_tensors(STEM, tensors, entry | {"bits": 3})
    with pytest.raises(KernelError, match="rounded offsets lose exactness"):
        PackedWeight.from_tensors(STEM, tensors | {f"{STEM}.offset": tensors[f"{STEM}.offset"].half()}, entry)
