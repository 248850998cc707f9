"""Pruned weights: one plane more serves them, code words give them back, damage is refused."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import PackedWeight, Spec, backends, gf2, native
from hcx.kernels.masked import TRAVERSALS, EncodedWeight, FixedToFixed, MaskedWeight, read_masked
from hcx.kernels.storage import stored_tensors
from hcx.testing.packed import random_packed

STEM = "model.layers.0.mlp.up_proj"


def masked(
    rows: int = 24, columns: int = 200, bits: int = 3, kept: float = 0.2, seed: int = 0, **more: Any
) -> MaskedWeight:
    generator = torch.Generator().manual_seed(seed)
    packed = random_packed(bits, rows, columns, 64, seed=seed, **more)
    return MaskedWeight.of(packed, torch.rand(rows, columns, generator=generator) < kept)


def read_back(weight: MaskedWeight | EncodedWeight) -> MaskedWeight:
    entry = json.loads(json.dumps(weight.describe()))
    return read_masked(STEM, load(save(weight.to_tensors(STEM))), entry)


def same(one: MaskedWeight, two: MaskedWeight) -> bool:
    pairs = [(one.packed.planes, two.packed.planes), (one.packed.scales, two.packed.scales), (one.mask, two.mask)]
    return all(torch.equal(a, b) for a, b in pairs)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 90),
    bits=st.integers(1, 3),
    kept=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    traversal=st.sampled_from([None, "rows", "columns", "scattered"]),
    n_in=st.sampled_from([3, 8]),
    n_s=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
def test_an_encoded_weight_comes_back_bit_for_bit(
    rows: int, columns: int, bits: int, kept: float, traversal: Any, n_in: int, n_s: int, seed: int
) -> None:
    weight = masked(rows, columns, bits, kept, seed, offset=False)
    encoded = weight.encode(FixedToFixed(n_in=n_in, n_s=n_s, traversal=traversal, segment=5))
    assert same(read_back(encoded), weight)
    assert same(read_back(weight), weight)
    tensors = encoded.to_tensors(STEM)
    assert encoded.size_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    expected = {f"{STEM}.{name}": shape for name, shape in stored_tensors(encoded.describe()).items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == expected
    whole = PackedWeight.from_tensors(STEM, tensors, encoded.describe())
    assert torch.equal(whole.planes, weight.to_packed().planes)


def test_a_plane_more_is_the_mask() -> None:
    for offset in (False, True):
        weight = masked(offset=offset)
        dense, served = weight.dequantize(), weight.to_packed()
        assert served.bits == weight.bits + 1
        assert bool((dense == 0).sum() >= (~weight.kept()).sum() > 0)
        assert torch.equal(dense, weight.packed.dequantize() * weight.kept())
        torch.testing.assert_close(served.dequantize(), dense, rtol=1e-6, atol=2e-6)
        if not offset:  # what is pruned is not merely small
            assert bool((served.dequantize()[~weight.kept()] == 0).all())


def test_masked_tables_equal_the_dense_product_exactly_in_integers() -> None:
    # LUT-GEMM's sums of 8 inputs by the key `code AND mask`; specification of fixed-to-fixed, section 10.
    weight = masked(rows=5, columns=64, bits=2, kept=0.4)
    generator = np.random.default_rng(0)
    x, alpha = generator.integers(-9, 10, 64), generator.integers(1, 5, (2, 5))
    keys = np.arange(256)[:, None] >> np.arange(8) & 1
    tables = keys @ x.reshape(8, 8).T  # [key, byte]: sum of the inputs whose bit is set
    mask, codes = weight.mask.numpy(), weight.packed.planes.numpy()
    by_tables = sum(
        alpha[i] * sum(2 * tables[codes[i, :, j] & mask[:, j], j] - tables[mask[:, j], j] for j in range(8))
        for i in range(2)
    )
    signs = weight.packed.signs().numpy().astype(int)
    dense = (alpha[:, :, None] * signs).sum(0) * weight.kept().numpy()
    assert np.array_equal(by_tables, dense @ x)


@pytest.mark.parametrize("numerics", ["reference", "exact", "fast"])
def test_every_backend_of_the_cpu_serves_a_pruned_weight(numerics: str) -> None:
    weight = masked(rows=40, columns=192, offset=False, kept=0.3)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    served = weight.to_packed()
    found = 0
    for backend in backends():
        spec = Spec.of(served, numerics=numerics)
        if backend.numerics != numerics or backend.why_not(spec) is not None:
            continue
        expected = x @ weight.dequantize().T
        error = (backend.matmul(x, backend.prepack(served)) - expected).norm() / expected.norm()
        # The mask's plane has the largest scale of all, so int8 tables lose more than on a dense weight.
        assert float(error) < {"reference": 1e-5, "exact": 1e-3, "fast": 5e-2}[numerics]
        found += 1
    assert found or native.why_absent() is not None


def test_rows_of_different_density_are_not_streamed_one_after_the_other() -> None:
    generator = np.random.default_rng(0)
    density = generator.beta(2, 18, 400)[:, None]
    kept = torch.from_numpy(generator.random((400, 400)) < density)
    weight = MaskedWeight.of(random_packed(1, 400, 400, 400, offset=False), kept)
    found = {order: weight.encode(FixedToFixed(traversal=order, n_out=80)) for order in ("rows", "columns")}
    chosen = weight.encode(FixedToFixed(n_out=80))
    assert chosen.traversal != "rows"
    assert found["rows"].variation > 0.6
    assert found["columns"].variation < 0.45
    assert chosen.efficiency > found["rows"].efficiency + 0.02
    assert same(read_back(chosen), weight)


def test_rows_and_columns_of_different_density_are_scattered() -> None:
    generator = np.random.default_rng(1)
    density = generator.beta(2, 8, 400)[:, None] * generator.beta(4, 4, 400)[None, :]
    weight = MaskedWeight.of(
        random_packed(1, 400, 400, 400, offset=False), torch.from_numpy(generator.random((400, 400)) < density)
    )
    found = {order: weight.encode(FixedToFixed(traversal=order, n_out=80)) for order in TRAVERSALS}
    assert weight.encode(FixedToFixed(n_out=80)).traversal == "scattered"
    assert found["scattered"].efficiency > max(found["rows"].efficiency, found["columns"].efficiency) + 0.003
    assert same(read_back(found["scattered"]), weight)


def test_a_plane_of_ones_is_complemented_and_costs_no_corrections() -> None:
    packed = random_packed(1, 16, 256, 64, offset=False)
    ones = PackedWeight(torch.full_like(packed.planes, 255), packed.scales, None, 256, 64)
    weight = MaskedWeight.of(ones, torch.rand(16, 256, generator=torch.Generator().manual_seed(0)) < 0.5)
    encoded = weight.encode()
    assert encoded.inverted == (True,)
    assert encoded.errors == (0,)
    assert same(read_back(encoded), weight)


def test_it_saves_bytes_where_the_specification_says_so() -> None:
    # Bits per weight with a raw mask, S = 0.5 and 0.9, specification section 9 (two registers there, one here).
    for sparsity, bits, planes_and_mask, saves in ((0.5, 2, 2.04, False), (0.5, 3, 2.55, True), (0.9, 3, 1.32, True)):
        weight = masked(256, 1024, bits, 1 - sparsity, offset=False)
        encoded = weight.encode()
        count = 256 * 1024
        found = 8 * (encoded.plane_bytes + weight.mask.numel()) / count
        stored = found - 8 * (weight.mask.numel() - weight.stored_mask.numel()) / count
        # One register loses up to 0.06 bits per plane and weight more than two; the gates add their bytes.
        assert planes_and_mask - 0.01 <= found <= planes_and_mask + 0.06 * bits
        assert encoded.saves_bytes is saves
        assert f"{stored:.3f} with the mask" in encoded.summary()
        assert encoded.size_bytes < weight.size_bytes


def test_a_sparse_mask_is_stored_near_its_entropy() -> None:
    for kept, entropy in ((0.1, 0.469), (0.3, 0.881)):
        weight = masked(512, 512, 1, kept, offset=False)
        assert entropy - 0.01 < 8 * weight.stored_mask.numel() / 512**2 < 1.05 * entropy
        assert weight.describe()["mask"] == "deflate"
        assert same(read_back(weight), weight)
        assert same(read_back(weight.encode()), weight)
    assert masked(512, 512, 1, 0.5, offset=False).describe()["mask"] == "raw"


def test_a_deflated_mask_that_is_cut_short_or_too_long_is_refused() -> None:
    weight = masked(256, 256, 1, 0.1, offset=False)
    tensors, entry = weight.to_tensors(STEM), weight.describe()
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(10**7))), dtype=torch.uint8)
    for stored in (weight.stored_mask[:-3], torch.cat([weight.stored_mask, weight.stored_mask[:1]]), bomb):
        with pytest.raises(KernelError, match=rf"^{STEM}: the mask is damaged or cut short"):
            read_masked(STEM, tensors | {f"{STEM}.mask": stored}, entry)


def flipped(tensors: dict[str, Tensor], name: str, byte: int, bit: int) -> dict[str, Tensor]:
    damaged = tensors[f"{STEM}.{name}"].clone()
    damaged.view(-1)[byte % damaged.numel()] ^= 1 << bit
    return tensors | {f"{STEM}.{name}": damaged}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["codes", "corrections", "network", "mask"]), byte=st.integers(0, 10**6), bit=st.integers(0, 7)
)
def test_any_flipped_bit_is_refused(name: str, byte: int, bit: int) -> None:
    encoded = ENCODED
    with pytest.raises(KernelError, match=rf"^{STEM}: .*(check sum|beyond the last input|damaged)"):
        read_masked(STEM, flipped(encoded.to_tensors(STEM), name, byte, bit), encoded.describe())


ENCODED = masked(12, 90, 2, 0.3, offset=False).encode()


def test_what_is_cut_short_or_missing_is_named() -> None:
    tensors, entry = ENCODED.to_tensors(STEM), ENCODED.describe()
    for name in ("codes", "corrections", "network"):
        short = tensors | {f"{STEM}.{name}": tensors[f"{STEM}.{name}"].flatten()[:-1]}
        with pytest.raises(KernelError, match=f"^{STEM}: "):
            read_masked(STEM, short, entry)
        with pytest.raises(KernelError, match=rf"{STEM}\.{name}: missing"):
            read_masked(STEM, {k: v for k, v in tensors.items() if not k.endswith(name)}, entry)
    with pytest.raises(KernelError, match=r"encoding' = .*zip.*not supported"):
        read_masked(STEM, tensors, entry | {"encoding": {"kind": "zip"}})
    with pytest.raises(KernelError, match=r"'encoding' = 'flexor' is not supported"):
        stored_tensors({**entry, "mask": None, "encoding": {"kind": "flexor"}})
    with pytest.raises(KernelError, match=r"mask = 'coded' is not supported"):
        read_masked(STEM, tensors, entry | {"mask": "coded"})


@settings(max_examples=40, deadline=None)
@given(
    key=st.sampled_from(sorted(ENCODED.describe()["encoding"])),
    value=st.one_of(
        st.none(), st.integers(-(2**40), 2**40), st.text(max_size=3), st.lists(st.integers(-9, 999), max_size=3)
    ),
)
def test_a_damaged_entry_is_refused_and_never_crashes(key: str, value: Any) -> None:
    entry = ENCODED.describe()
    if entry["encoding"][key] == value:
        return
    entry["encoding"][key] = value
    message = STEM
    try:
        weight = read_masked(STEM, ENCODED.to_tensors(STEM), entry)
    except KernelError as error:
        message = str(error)
    else:  # a number that says the same, or one that nothing is decoded by
        assert key in ("errors", "segment", "inverted")
        assert same(weight, ENCODED.weight)
    assert message.startswith(STEM)


def test_the_stream_is_checked_even_where_the_check_sum_of_the_file_was_forged() -> None:
    entry = ENCODED.describe()
    tensors = flipped(ENCODED.to_tensors(STEM), "codes", 7, 2)
    damaged = EncodedWeight(**{**vars(ENCODED), "codes": tensors[f"{STEM}.codes"]})
    entry["encoding"]["stored_crc32"] = damaged.describe()["encoding"]["stored_crc32"]
    stream = gf2.decode(tensors[f"{STEM}.codes"][0].numpy(), ENCODED.network, 8 * ENCODED.weight.mask.numel(), 4096)
    assert stream.size == ENCODED.weight.mask.numel()
    with pytest.raises(KernelError, match="does not decode to what was encoded"):
        read_masked(STEM, tensors, entry)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    packed = random_packed(2, 4, 20, 10)
    with pytest.raises(KernelError, match=r"mask is torch.uint8 \(4, 2\); expected uint8 \(4, 3\)"):
        MaskedWeight(packed, torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(KernelError, match="beyond the last input"):
        MaskedWeight(packed, torch.full((4, 3), 255, dtype=torch.uint8))
    with pytest.raises(KernelError, match="no room"):
        masked(4, 16, 8).to_packed()
