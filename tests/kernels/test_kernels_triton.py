"""The Triton kernels, compiled where there is a GPU and in Triton's interpreter elsewhere: against plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import PackedWeight, Spec, select
from hcx.kernels.format import pack_signs
from hcx.kernels.reference import ReferenceBackend
from hcx.kernels.registry import NUMERICS
from hcx.kernels.triton import backend as triton_backend
from hcx.kernels.triton.backend import TritonBackend, TritonExactBackend
from hcx.kernels.triton.layout import PARTS, pack, pack_scales, unpack_planes, words_per_group

pytest.importorskip("triton", reason="the package triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _import_operators() -> None:
    # The interpreter is chosen when a kernel is defined; the variable must not stay for other tests of the process.
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        import hcx.kernels.triton.ops  # noqa: F401


_import_operators()

FAST = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 6e-5}
"""Relative L2 error beside the rounding of the output: levels are rounded to 8 or 11 bits of mantissa (2^-9 or 2^-12
of a level, and the parts of a level may be larger than their sum); fp32 activations are always computed exactly."""
EXACT = 6e-5
"""The class `exact` (design, section 4): levels and fp32 activations keep 16 bits."""
GRADIENT = 2e-5
"""fp32 gradients: `dy` and `x` keep 16 bits (2^-17 each), sums are fp32."""

# rows, inputs, group, columns: tails in both dimensions; groups of each word count, one a row, and with an odd factor
SHAPES = [(5, 70, 32, 1), (33, 150, 64, 3), (65, 140, 128, 2), (7, 100, 100, 9), (3, 200, 96, 1)]


def weight(
    bits: int,
    rows: int,
    inputs: int,
    group: int,
    *,
    offset: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    return PackedWeight(
        pack_signs(torch.rand(bits, rows, inputs, generator=generator) < 0.5),
        # Both signs: training moves scales through zero.
        torch.randn(bits, rows, groups, generator=generator).to(dtype),
        torch.randn(rows, groups, generator=generator) if offset else None,
        inputs,
        group,
    ).to(DEVICE)


def integer_weight(bits: int, rows: int, inputs: int, group: int, offset: bool) -> PackedWeight:
    """Scales are powers of two and offsets halves: with small integers as inputs every sum is exact in fp32."""
    random = weight(bits, rows, inputs, group, offset=offset)
    scales = 2.0 ** -torch.arange(bits)[:, None, None] * random.scales.cpu().float().sign()
    offsets = None if random.offset is None else (2 * random.offset).round() / 2
    return replace(random, scales=scales.half().to(DEVICE), offset=offsets)


def activations(columns: int, inputs: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(columns, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def integers(columns: int, inputs: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-7, 8, (columns, inputs), generator=generator).to(dtype).to(DEVICE)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def true_product(x: Tensor, packed: PackedWeight) -> Tensor:
    return x.double() @ packed.dequantize().double().t()


# ---- the layout


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_gpu_layout_gives_back_every_plane_bit(bits: int) -> None:
    for rows, inputs, group, _ in SHAPES:
        packed = weight(bits, rows, inputs, group)
        assert torch.equal(unpack_planes(pack(packed)), packed.planes)


def test_packing_in_pieces_gives_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = weight(3, 130, 96, 32)
    whole = pack(packed).codes
    monkeypatch.setattr("hcx.kernels.triton.layout._CHUNK_BITS", 3 * 128 * 17)
    assert torch.equal(pack(packed).codes, whole)


def indices_by_hand(words: list[int], kind: int) -> list[int]:
    """The 32 table indices of a part's words, from the words of the layout page, one nibble at a time."""
    found = []
    for place in range(32):
        selector, nibble = divmod(place, 8)
        if kind == 1:
            found.append(words[0] >> selector >> 4 * nibble & 1)
        elif kind == 2:
            found.append(words[selector // 2] >> 2 * (selector % 2) >> 4 * nibble & 3)
        elif selector < 3:
            found.append(words[selector] >> 4 * nibble & 7)
        else:
            found.append(sum((words[i] >> 4 * nibble + 3 & 1) << i for i in range(3)))
    return found


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_word_holds_what_the_layout_says(bits: int) -> None:
    packed = weight(bits, 18, 160, 32)
    codes, signs = pack(packed).codes, packed.signs().int()
    row, tile, quarter = 17, 1, 0  # inputs 128 to 159
    words = [int(codes[row // 16, tile, plane, row % 16, quarter]) & 0xFFFFFFFF for plane in range(bits)]
    plane = 0
    for kind in PARTS[bits]:
        indices = indices_by_hand(words[plane : plane + kind], kind)
        for place, index in enumerate(indices):
            positive = [int(signs[plane + i, row, 128 + place]) for i in range(kind)]
            if kind == 4:
                negative = words[plane + 3] >> 8 * (place % 4) + 7 - place // 4 & 1
                assert positive[0] == (-1 if negative else 1)
                positive = [sign * positive[0] for sign in positive[1:]]
            assert [2 * (index >> i & 1) - 1 for i in range(len(positive))] == positive
        plane += kind


def test_a_thread_takes_as_many_words_as_its_group_allows() -> None:
    assert [words_per_group(group, 4096) for group in (32, 64, 96, 128, 192, 256, 4096)] == [1, 2, 1, 4, 2, 4, 4]
    assert words_per_group(100, 100) == 4


# ---- the product


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("backend", [TritonBackend(), TritonExactBackend()], ids=lambda b: b.name)
def test_integers_are_multiplied_exactly(backend: TritonBackend, bits: int) -> None:
    dtypes = [(torch.bfloat16, torch.float16), (torch.float32,)][backend.exact]
    for case, dtype in enumerate(dtypes):
        rows, inputs, group, columns = SHAPES[(bits + 2 * case) % len(SHAPES)]
        packed = integer_weight(bits, rows, inputs, group, offset=(bits + case) % 3 > 0)
        x = integers(columns, inputs, dtype)
        found = backend.matmul(x, backend.prepack(packed))
        assert found.dtype == dtype
        assert torch.equal(found, true_product(x, packed).to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_product_is_the_references_within_its_class(bits: int, dtype: torch.dtype) -> None:
    rows, inputs, group, columns = SHAPES[bits % len(SHAPES)]
    scale_dtype = (torch.float16, torch.bfloat16, torch.float32)[bits % 3]
    packed = weight(bits, rows, inputs, group, offset=bits % 2 == 0, dtype=scale_dtype)
    x = activations(columns, inputs, dtype)
    expected = true_product(x, packed)
    rounding = relative(expected.to(dtype), expected)
    for backend, allowed in ((TritonBackend(), FAST[dtype]), (TritonExactBackend(), EXACT)):
        assert relative(backend.matmul(x, backend.prepack(packed)), expected) <= rounding + allowed


@pytest.mark.parametrize("seed", range(200 if DEVICE == "cuda" else 6))
def test_any_weight_of_the_domain_is_multiplied_exactly(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    bits, rows, inputs, columns = draw(*range(1, 9)), draw(*range(1, 80)), draw(*range(1, 300)), draw(1, 2, 8, 9, 17)
    group = draw(32, 64, 96, 128, 160, 256, inputs)
    packed = integer_weight(bits, rows, inputs, group, draw(True, False))
    x = integers(columns, inputs, draw(torch.bfloat16, torch.float16))
    backend = draw(TritonBackend(), TritonExactBackend())
    found = backend.matmul(x, backend.prepack(packed))
    assert torch.equal(found, true_product(x, packed).to(x.dtype)), (bits, rows, inputs, columns, group, x.dtype)


def test_leading_dimensions_and_an_empty_batch_are_kept() -> None:
    packed = weight(2, 5, 64, 32)
    backend = TritonBackend()
    ready = backend.prepack(packed)
    x = activations(6, 64, torch.float16)
    flat = backend.matmul(x, ready)
    assert torch.equal(backend.matmul(x.view(2, 3, 64), ready), flat.view(2, 3, 5))
    assert torch.equal(backend.matmul(x[0], ready), flat[0])
    assert torch.equal(backend.matmul(x.t().contiguous().t(), ready), flat)  # not contiguous
    assert backend.matmul(x[:0], ready).shape == (0, 5)


def test_a_row_of_a_batch_is_what_it_is_alone_and_the_same_each_time() -> None:
    packed = weight(2, 20, 520, 128)
    backend = TritonBackend()
    ready = backend.prepack(packed)
    x = activations(2, 520, torch.bfloat16)
    together = backend.matmul(x, ready)
    assert torch.equal(backend.matmul(x, ready), together)
    assert torch.equal(torch.stack([backend.matmul(row, ready) for row in x]), together)


def test_weights_beyond_fp16_are_served_to_fp16_activations() -> None:
    packed = replace(weight(2, 5, 64, 32), scales=torch.full((2, 5, 2), 6e4, device=DEVICE).half())
    ready = TritonBackend().prepack(packed)
    assert not ready.fits_half
    x = (activations(2, 64, torch.float16) / 1e4).half()
    found = TritonBackend().matmul(x, ready)
    assert relative(found, true_product(x, packed)) <= FAST[torch.float16]


@pytest.mark.parametrize("backend", [TritonBackend(), TritonExactBackend()], ids=lambda b: b.name)
def test_large_batches_go_through_a_dense_copy(backend: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCX_DEQUANTIZE_ABOVE", "2")
    monkeypatch.setattr("hcx.kernels.triton.launch.DENSE_BYTES", 64 * 16 * 2)  # in several pieces
    packed = integer_weight(4, 40, 64, 32, offset=True)
    x = integers(3, 64, torch.bfloat16)

    def refused(*_: object) -> Tensor:
        raise AssertionError("the fused product ran")

    monkeypatch.setattr("hcx.kernels.triton.launch.product", refused)
    assert torch.equal(backend.matmul(x, backend.prepack(packed)), true_product(x, packed).bfloat16())
    monkeypatch.setenv("HCX_DEQUANTIZE_ABOVE", "many")
    with pytest.raises(KernelError, match="HCX_DEQUANTIZE_ABOVE = 'many'; it takes a number"):
        backend.matmul(x, backend.prepack(packed))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_dense_copy_is_the_formats_bit_for_bit(bits: int) -> None:
    from hcx.kernels.triton import launch

    for rows, inputs, group, _ in SHAPES[:: 2 if bits % 2 else 3]:
        packed = weight(bits, rows, inputs, group, offset=bits % 2 == 1)
        ready = pack(packed)
        for dtype in (torch.float32, torch.bfloat16):
            dense = launch.dequantize(ready.codes, ready.scales, ready.offset, inputs, group, dtype, 0, rows)
            assert torch.equal(dense, packed.dequantize(dtype))


# ---- gradients


def reference_product(x: Tensor, packed: PackedWeight, scales: Tensor, offset: Tensor | None) -> Tensor:
    """Plain torch, differentiable: what autograd makes of the definition."""
    groups, group = packed.num_groups, packed.group_size
    signs = F.pad(packed.signs(x.dtype), (0, groups * group - packed.in_features)).unflatten(2, (groups, group))
    dense = (signs * scales[..., None]).sum(0)
    if offset is not None:
        dense = dense + offset[..., None]
    return x @ dense.flatten(1)[:, : packed.in_features].t()


@pytest.mark.parametrize(
    ("bits", "shape", "offset", "dense"),
    [(1, 3, True, False), (3, 0, False, False), (4, 4, True, False), (7, 0, True, False), (2, 1, True, True)],
)
def test_gradients_are_those_of_plain_torch(
    bits: int, shape: int, offset: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hcx.kernels.triton.ops import gpu_product

    monkeypatch.setenv("HCX_DEQUANTIZE_ABOVE", "0" if dense else "1000")
    rows, inputs, group, columns = SHAPES[shape]
    packed = weight(bits, rows, inputs, group, offset=offset, dtype=torch.float32)
    ready = pack(packed)
    x = activations(columns, inputs, torch.float32).requires_grad_()
    scales = packed.scales.clone().requires_grad_()
    offsets = None if packed.offset is None else packed.offset.clone().requires_grad_()
    packed_offsets = None if offsets is None else F.pad(offsets.t(), (0, -rows % 64))
    wanted = [t for t in (x, scales, offsets) if t is not None]
    found = gpu_product(x, ready.codes, pack_scales(scales), packed_offsets, rows, group, True)
    upstream = activations(columns, rows, torch.float32, seed=3)
    gradients = torch.autograd.grad(found, wanted, upstream)

    wide = [t.detach().double().requires_grad_() for t in wanted]
    expected = reference_product(wide[0], packed, wide[1], wide[2] if offset else None)
    for one, other in zip(gradients, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert one.dtype == torch.float32
        assert relative(one, other) <= GRADIENT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_integers_in_16_bits_are_exact(dtype: torch.dtype) -> None:
    from hcx.kernels.triton.ops import gpu_input_gradient, gpu_scale_gradient

    packed = integer_weight(3, 20, 96, 32, offset=True)
    ready = pack(packed)
    x, upstream = integers(3, 96, dtype), integers(3, 20, dtype)
    found = gpu_input_gradient(upstream, ready.codes, ready.scales, ready.offset, 96, 32, False)
    assert torch.equal(found, (upstream.double() @ packed.dequantize().double()).to(dtype))
    scales, offset = gpu_scale_gradient(upstream, x, ready.codes, ready.scales, 32, True)
    outer = upstream.double().t() @ x.double()
    by_group = (packed.signs(torch.float64) * outer).unflatten(2, (3, 32)).sum(-1)
    assert torch.equal(scales[:, :, :20].permute(1, 2, 0).double(), by_group)
    assert torch.equal(offset[:, :20].t().double(), outer.unflatten(1, (3, 32)).sum(-1))


def test_an_input_that_needs_no_gradient_is_not_kept_for_the_scales() -> None:
    from hcx.kernels.triton.ops import gpu_product

    packed = weight(2, 5, 64, 32)
    ready = pack(packed)
    x = activations(2, 64, torch.float32).requires_grad_()
    found = gpu_product(x, ready.codes, ready.scales, None, 5, 32, True)
    kept = [t for t in found.grad_fn.saved_tensors if t is not None]
    assert all(t.data_ptr() != x.data_ptr() for t in kept)


def test_the_operators_pass_torchs_own_checks() -> None:
    from hcx.kernels.triton import ops

    packed = weight(1, 5, 64, 32, offset=True)
    ready = pack(packed)
    x = activations(1, 64, torch.float32).requires_grad_()
    scales = ready.scales.float().requires_grad_()
    assert ready.offset is not None
    offsets = ready.offset.clone().requires_grad_()
    torch.library.opcheck(ops.gpu_product, (x, ready.codes, scales, offsets, 5, 32, True))
    # The others are no leaves of autograd: their schema and their shapes.
    checks = ("test_schema", "test_faketensor")
    plain = (ready.codes, ready.scales, ready.offset)
    upstream = activations(1, 5, torch.float32)
    torch.library.opcheck(ops.gpu_product, (x, ready.codes, scales, None, 5, 32, True), test_utils=checks)
    torch.library.opcheck(ops.gpu_input_gradient, (upstream, *plain, 64, 32, True), test_utils=checks)
    for offset in (True, False):
        arguments = (upstream, x.detach(), *plain[:2], 32, offset)
        torch.library.opcheck(ops.gpu_scale_gradient, arguments, test_utils=checks)
    torch.library.opcheck(ops.gpu_dequantize, (*plain, 64, 32, torch.bfloat16, 0, 5), test_utils=checks)


# ---- the choice


def gpu_spec(**changes: object) -> Spec:
    return replace(Spec("cuda", 8, 4096, 3, 128, numerics="fast"), **changes)  # type: ignore[arg-type]


def test_reasons_are_given_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TritonBackend()
    assert "runs on CUDA devices, and the weight is on cpu" in str(backend.why_not(gpu_spec(device="cpu")))
    monkeypatch.setattr(triton_backend, "why_absent", lambda: "no CUDA device")
    assert backend.why_not(gpu_spec()) == "no CUDA device"
    monkeypatch.setattr(triton_backend, "why_absent", lambda: None)
    assert backend.why_not(gpu_spec()) is None
    assert backend.why_not(gpu_spec(group_size=8192)) is None  # one group a row
    assert "groups of 100 inputs; it needs a multiple of 32" in str(backend.why_not(gpu_spec(group_size=100)))


@pytest.mark.parametrize(
    ("found", "capability", "reason"),
    [
        (None, None, "install it with: pip install 'hcx-llm[gpu]'"),
        ("triton", None, "no CUDA device"),
        ("triton", (7, 5), "compute capability 7.5; it needs 8.0"),
        ("triton", (9, 0), None),
    ],
)
def test_a_machine_that_cannot_says_why(
    monkeypatch: pytest.MonkeyPatch, found: str | None, capability: tuple[int, int] | None, reason: str | None
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    why = triton_backend.why_absent.__wrapped__()
    assert why is None if reason is None else reason in why


def test_the_class_asked_for_decides_which_of_the_two_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "why_absent", lambda: None)
    monkeypatch.delenv("HCX_KERNEL", raising=False)
    candidates = [TritonBackend(), TritonExactBackend(), ReferenceBackend()]
    chosen = {numerics: select(gpu_spec(numerics=numerics), among=candidates).name for numerics in NUMERICS}
    assert chosen == {"fast": "triton", "exact": "triton-exact", "reference": "reference"}


def test_the_golden_weight_has_groups_that_are_refused_by_name() -> None:
    path = Path(__file__).parent / "golden_8x16.safetensors"
    entry = {"in_features": 16, "group_size": 6, "offset": True}
    packed = PackedWeight.from_tensors("model.layers.0.mlp.up_proj", load_file(path), entry)
    with pytest.raises(KernelError, match="do not take groups of 6 inputs"):
        pack(packed)


def test_the_golden_planes_are_multiplied_exactly_as_one_group() -> None:
    """The golden planes, with the scales of their first group for the whole row."""
    path = Path(__file__).parent / "golden_8x16.safetensors"
    entry = {"in_features": 16, "group_size": 6, "offset": True}
    golden = PackedWeight.from_tensors("model.layers.0.mlp.up_proj", load_file(path), entry)
    assert golden.offset is not None
    packed = PackedWeight(
        golden.planes, golden.scales[:, :, :1].contiguous(), golden.offset[:, :1].contiguous(), 16, 16
    ).to(DEVICE)
    x = integers(2, 16, torch.float32)
    found = TritonBackend().matmul(x, TritonBackend().prepack(packed))
    assert torch.equal(found, true_product(x, packed).float())
    assert packed.dequantize()[0, :2].tolist() == [0.25, -0.75]  # as FORMAT.md works out by hand


def test_a_wrong_input_is_refused_in_words() -> None:
    backend = TritonBackend()
    ready = backend.prepack(weight(2, 5, 64, 32))
    with pytest.raises(KernelError, match="the input has 65 features, the weight takes 64"):
        backend.matmul(activations(1, 65, torch.float16), ready)
    with pytest.raises(KernelError, match=r"the input is torch\.float64; the GPU kernels take fp16, bf16 and fp32"):
        backend.matmul(activations(1, 64, torch.float64), ready)
    with pytest.raises(KernelError, match="the input is on meta, the weight on"):
        backend.matmul(torch.empty(1, 64, device="meta", dtype=torch.float16), ready)
    with pytest.raises(KernelError, match="codes are"):
        backend.matmul(activations(1, 64, torch.float16), replace(ready, group_size=64))
    with pytest.raises(KernelError, match=r"scales and offset are .* 64 inputs need 2 groups of 32"):
        backend.matmul(activations(1, 64, torch.float16), replace(ready, scales=ready.scales[:1]))
    with pytest.raises(KernelError, match="scales and offset are"):
        backend.matmul(activations(1, 64, torch.float16), replace(ready, offset=torch.zeros(1, 64, device=DEVICE)))


def test_the_backends_are_asked_without_importing_triton() -> None:
    script = (
        "import sys; from hcx.kernels import Spec; from hcx.kernels.triton.backend import TritonBackend;"
        "print(TritonBackend().why_not(Spec('cpu', 8, 64, 2, 32))); assert 'triton' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "CUDA" in done.stdout


@pytest.mark.gpu
def test_a_product_is_captured_in_a_cuda_graph() -> None:
    backend = TritonBackend()
    ready = backend.prepack(weight(3, 256, 4096, 128))
    x = activations(1, 4096, torch.bfloat16)
    expected = backend.matmul(x, ready)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = backend.matmul(x, ready)
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)
