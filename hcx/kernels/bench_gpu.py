"""Side-by-side timing of products on a GPU: our kernels, cuBLAS, torch's int4 and gemlite, in one process.

Each contender owns enough copies of its weights that none comes from the L2 cache. Its calls over all copies are one
CUDA graph, so that launching costs nobody anything; contenders take turns, graph by graph, between CUDA events; and the
floor, a read of the very bytes of a contender, is timed in the same loop. Ratios inside one run are the result.

Never run on a GPU so far.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels.format import PackedWeight
from hcx.kernels.lut_gpu import MAX_COLUMNS, LutBackend, LutWeight
from hcx.kernels.triton.backend import TritonBackend, TritonExactBackend, why_absent
from hcx.kernels.triton.layout import GpuWeight

GROUP = 128
FOOTPRINT_BYTES = 256 << 20
"""Of weights per contender: five times the L2 cache of an H100."""
TURNS = 200
_ERROR_ROWS = 4096
"""Rows whose product is computed in float64 at once."""


@dataclass(frozen=True)
class GpuCase:
    """One comparison.

    Attributes:
        out_features, in_features: of the matrix.
        batch: rows of the input.
        bits: planes of our contenders.
    """

    out_features: int
    in_features: int
    batch: int
    bits: tuple[int, ...] = (1, 2, 3, 4)


@dataclass(frozen=True)
class GpuContender:
    """One way to multiply.

    Attributes:
        kernel: its name.
        bits: per weight, without scales.
        group: inputs per scale; 0 if there is none.
        numerics: `fast`, `exact`, or what a peer computes in.
        memory: its codes or weights, one tensor per copy.
        run: multiplies with a copy.
        expected: the product of its stored weights in float64.
        size_bytes: of one copy, with scales.
    """

    kernel: str
    bits: int
    group: int
    numerics: str
    memory: Sequence[Tensor]
    run: Callable[[int], Tensor]
    expected: Tensor
    size_bytes: int


@dataclass(frozen=True)
class GpuRow:
    """The outcome for one contender; columns as in `hcx bench kernels` on a CPU.

    Percentiles are over turns; a turn is the mean of one call with each copy. `of_floor` is the floor's time over the
    contender's, scaled to all of its bytes: 1 is memory speed, and more than that a mistake of measurement.
    """

    kernel: str
    device: str
    out: int
    in_: int
    bits: int
    group: int
    batch: int
    threads: int
    numerics: str
    us_p2: float
    us_p50: float
    us_p90: float
    floor_us_p2: float
    of_floor: float
    relative_error: float
    size_bytes: int
    weights: str
    samples: int
    isa: str
    torch: str

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON, with the column name `in`."""
        return {("in" if key == "in_" else key): value for key, value in asdict(self).items()}


@dataclass
class Outcome:
    """Rows of a case, and which contenders were left out and why."""

    rows: list[GpuRow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def cases(quick: bool) -> list[GpuCase]:
    """The table of the specification: four matrices, batches from decoding to prefill; one matrix if `quick`."""
    if quick:
        return [GpuCase(4096, 4096, 1, (2, 3, 4)), GpuCase(4096, 4096, 8, (3,))]
    shapes = ((4096, 4096), (14336, 4096), (28672, 8192), (49152, 12288))
    return [GpuCase(*shape, batch) for shape in shapes for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)]


def random_weight(case: GpuCase, bits: int, device: str) -> PackedWeight:
    """Random planes and falling fp16 scales; the time of no kernel depends on the values."""
    generator = torch.Generator(device).manual_seed(bits)
    groups = -(-case.in_features // GROUP)
    shape = (bits, case.out_features, -(-case.in_features // 8))
    planes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
    scales = torch.rand(bits, case.out_features, groups, generator=generator, device=device) + 0.5
    scales /= 2.0 ** torch.arange(bits, device=device)[:, None, None]
    return PackedWeight(planes, scales.half(), None, case.in_features, GROUP)


def copies_of(size_bytes: int, footprint: int) -> int:
    """How many copies exceed the caches; two at least, so that no read warms the next."""
    return max(2, -(-footprint // size_bytes))


def ours(case: GpuCase, x: Tensor, footprint: int) -> Iterator[GpuContender]:
    """The Triton kernels at each number of planes, and the table kernel where the device and the batch allow it."""
    for bits in case.bits:
        weight = random_weight(case, bits, x.device.type)
        expected = product_in_float64(x, weight.dequantize())
        for backend in (TritonBackend(), TritonExactBackend()):
            packed = backend.prepack(weight)
            codes = [packed.codes.clone() for _ in range(copies_of(packed.size_bytes, footprint))]
            yield GpuContender(
                backend.name, bits, GROUP, backend.numerics, codes,
                partial(_run_codes, backend, x, packed, codes),
                expected, packed.size_bytes,
            )  # fmt: skip
        if bits <= 3 and case.batch <= MAX_COLUMNS and x.device.type == "cuda":
            table = LutBackend()
            plain = table.prepack(weight)
            words = [plain.words.clone() for _ in range(copies_of(weight.size_bytes, footprint))]
            yield GpuContender(
                table.name, bits, GROUP, table.numerics, words,
                partial(_run_words, table, x, plain, words),
                expected, weight.size_bytes,
            )  # fmt: skip


def cublas(case: GpuCase, x: Tensor, footprint: int) -> Iterator[GpuContender]:
    """The dense product in bf16."""
    weight = _dense(case, x)
    size = weight.numel() * weight.element_size()
    memory = [weight.clone() for _ in range(copies_of(size, footprint))]
    expected = product_in_float64(x, weight)
    yield GpuContender("cublas-bf16", 16, 0, "bf16", memory, lambda copy: F.linear(x, memory[copy]), expected, size)


def torch_int4(case: GpuCase, x: Tensor, footprint: int) -> Iterator[GpuContender]:
    """torch's own weight-only int4 product, scales and zero points in bf16."""
    generator = torch.Generator(x.device).manual_seed(0)
    shape, groups = (case.out_features, case.in_features), case.in_features // GROUP
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=x.device, generator=generator)
    scales = torch.rand(groups, case.out_features, 2, device=x.device, generator=generator).bfloat16()
    # What the kernel computes: (code - 8) * scale + zero, in bf16 after one rounding.
    dense = (codes.float() - 8).unflatten(1, (groups, GROUP)) * scales[..., 0].t()[..., None].float()
    dense = (dense + scales[..., 1].t()[..., None].float()).flatten(1)
    packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    size = packed.numel() * packed.element_size() + scales.numel() * scales.element_size()
    memory = [packed.clone() for _ in range(copies_of(size, footprint))]
    yield GpuContender(
        "torch-int4", 4, GROUP, "bf16", memory,
        lambda copy: torch._weight_int4pack_mm(x, memory[copy], GROUP, scales),
        product_in_float64(x, dense), size,
    )  # fmt: skip


def gemlite(case: GpuCase, x: Tensor, footprint: int) -> Iterator[GpuContender]:
    """gemlite's kernels at the widths it has, with fp16 activations."""
    if importlib.util.find_spec("gemlite") is None:
        raise KernelError("the package 'gemlite' is not installed")
    from gemlite.core import DType, GemLiteLinear

    generator = torch.Generator(x.device).manual_seed(0)
    half = x.half()
    for bits in (1, 2, 4):
        shape, groups = (case.out_features, case.in_features), case.in_features // GROUP
        codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, device=x.device, generator=generator)
        scales = (torch.rand(case.out_features, groups, device=x.device, generator=generator) + 0.5).half()
        zeros = torch.full_like(scales, (2**bits - 1) / 2)
        dense = (codes.float().unflatten(1, (groups, GROUP)) - zeros[..., None].float()) * scales[..., None].float()
        size = codes.numel() * bits // 8 + 2 * (scales.numel() * scales.element_size())
        layers = []
        for _ in range(copies_of(size, footprint)):
            layer = GemLiteLinear(
                W_nbits=bits, group_size=GROUP, in_features=case.in_features, out_features=case.out_features,
                input_dtype=DType.FP16, output_dtype=DType.FP16,
            )  # fmt: skip
            layer.pack(codes, scales.view(-1, 1), zeros.view(-1, 1), None)
            layers.append(layer)
        yield GpuContender(
            "gemlite", bits, GROUP, "fp16", [layer.W_q for layer in layers],
            partial(_run_layer, layers, half), product_in_float64(half, dense.flatten(1)), size,
        )  # fmt: skip


PEERS: dict[str, Callable[[GpuCase, Tensor, int], Iterator[GpuContender]]] = {
    "cublas-bf16": cublas,
    "torch-int4": torch_int4,
    "gemlite": gemlite,
}


def measure(case: GpuCase, turns: int = TURNS, footprint: int = FOOTPRINT_BYTES) -> Outcome:
    """Times all contenders of a case in turns on the current CUDA device.

    Raises:
        KernelError: the Triton kernels cannot run here; with the reason.
    """
    reason = why_absent()
    if reason is not None:
        raise KernelError(f"kernels cannot be timed on a GPU: {reason}")
    x = torch.randn(case.batch, case.in_features, generator=torch.Generator().manual_seed(9)).bfloat16().cuda()
    outcome = Outcome()
    contenders: list[GpuContender] = []
    with torch.inference_mode():
        contenders += ours(case, x, footprint)
        for name, make in PEERS.items():
            try:
                peers = list(make(case, x, footprint))
                for peer in peers:
                    peer.run(0)
            except (RuntimeError, KernelError, ImportError, TypeError, AttributeError) as error:
                # A peer may lack a kernel for this card, or have changed its interface: the table says so and goes on.
                outcome.left_out[name] = str(error).splitlines()[0]
            else:
                contenders += peers
        errors = [relative_error(contender) for contender in contenders]
        graphs = [_graphs(contender) for contender in contenders]
        times, floors = _take_turns(contenders, graphs, turns)
    outcome.rows = [
        row(case, contender, error, own, floor)
        for contender, error, own, floor in zip(contenders, errors, times, floors, strict=True)
    ]
    return outcome


def relative_error(contender: GpuContender) -> float:
    """Of its first call, against float64."""
    found = contender.run(0)
    return float((found.double() - contender.expected).norm() / contender.expected.norm())


def product_in_float64(x: Tensor, dense: Tensor) -> Tensor:
    """`x W^T` of a stored weight, some rows at a time: the largest would take 5 GB at once."""
    return torch.cat([x.double() @ piece.double().t() for piece in dense.split(_ERROR_ROWS)], dim=1)


def _run_codes(backend: TritonBackend, x: Tensor, packed: GpuWeight, codes: Sequence[Tensor], copy: int) -> Tensor:
    return backend.matmul(x, replace(packed, codes=codes[copy]))


def _run_words(backend: LutBackend, x: Tensor, packed: LutWeight, words: Sequence[Tensor], copy: int) -> Tensor:
    return backend.matmul(x, replace(packed, words=words[copy]))


def _run_layer(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, copy: int) -> Tensor:
    return layers[copy](x)


def _dense(case: GpuCase, x: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(0)
    shape = (case.out_features, case.in_features)
    return torch.randn(shape, generator=generator, device=x.device, dtype=torch.bfloat16)


def _graphs(contender: GpuContender) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
    """Its calls over all copies, and reads of the same copies; both in the same order."""
    from hcx.kernels.triton.read import read

    found = []
    for call in (contender.run, lambda copy: read(contender.memory[copy])):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call(0)  # compiling and choosing kernels is no part of a graph
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in range(len(contender.memory)):
                call(copy)
        found.append(graph)
    return found[0], found[1]


def _take_turns(
    contenders: Sequence[GpuContender], graphs: Sequence[tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]], turns: int
) -> tuple[list[list[float]], list[list[float]]]:
    times: list[list[float]] = [[] for _ in contenders]
    floors: list[list[float]] = [[] for _ in contenders]
    order = random.Random(0)
    for _ in range(turns):
        # No one always follows the same other: what that left in the cache would count as a property of both.
        for number in order.sample(range(len(contenders)), len(contenders)):
            for graph, into in zip(graphs[number], (times[number], floors[number]), strict=True):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                into.append(1e3 * begin.elapsed_time(end) / len(contenders[number].memory))
    return times, floors


def row(
    case: GpuCase, contender: GpuContender, error: float, times: Sequence[float], floors: Sequence[float]
) -> GpuRow:
    """The row of a contender, from microseconds per call and per read in each turn."""

    def quantile(values: Sequence[float], at: float) -> float:
        return round(sorted(values)[int(at * len(values))], 2)

    codes = contender.memory[0]
    # The floor reads the codes; a contender reads its scales besides.
    floor = quantile(floors, 0.02) * contender.size_bytes / (codes.numel() * codes.element_size())
    fastest = quantile(times, 0.02)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return GpuRow(
        kernel=contender.kernel,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        out=case.out_features,
        in_=case.in_features,
        bits=contender.bits,
        group=contender.group,
        batch=case.batch,
        threads=0,
        numerics=contender.numerics,
        us_p2=fastest,
        us_p50=quantile(times, 0.5),
        us_p90=quantile(times, 0.9),
        floor_us_p2=round(floor, 2),
        of_floor=round(floor / fastest, 3),
        relative_error=float(f"{error:.3g}"),
        size_bytes=contender.size_bytes,
        weights="memory",
        samples=len(times),
        isa=f"sm_{capability[0]}{capability[1]}",
        torch=torch.__version__,
    )
