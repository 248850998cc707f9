"""Side-by-side timing of products: our kernels, torch, and other libraries where they are, in one process.

Contenders take turns, call by call, so that a noisy machine disturbs all alike; each owns enough copies of its weights
that none comes from a cache; and the floor, a read of the very bytes of a contender, is timed in the same loop. Ratios
inside one run are the result; microseconds of two runs are not comparable.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import native
from hcx.kernels.format import PackedWeight
from hcx.obs.machine import cpu_name

GROUP = 128
MIN_SAMPLES = 30


@dataclass(frozen=True)
class KernelCase:
    """One comparison.

    Attributes:
        out_features, in_features: of the matrix.
        batch: rows of the input.
        threads: of every contender.
        bits: planes of our contenders.
        resident: one copy, hot in a cache, as the weights of a small model are.
    """

    out_features: int
    in_features: int
    batch: int
    threads: int
    bits: tuple[int, ...] = (1, 2, 3, 4)
    resident: bool = False


@dataclass(frozen=True)
class Contender:
    """One way to multiply.

    Attributes:
        kernel: its name.
        bits: per weight, without scales.
        group: inputs per scale; 0 if there is none.
        numerics: `fast`, `exact`, `reference`, or what a peer computes in.
        memory: its weights, one tensor per copy; None where a library hides them.
        run: multiplies with a copy.
        expected: the exact product of its weights; of the weights before quantization, where only the library knows.
        copies: how many there are.
        size_bytes: of one copy.
    """

    kernel: str
    bits: float
    group: int
    numerics: str
    memory: Sequence[Tensor] | None
    run: Callable[[int], Tensor]
    expected: Tensor
    copies: int
    size_bytes: int


@dataclass(frozen=True)
class KernelRow:
    """The outcome for one contender. Percentiles are over single calls; `us_p2` is the undisturbed time.

    `relative_error` is that of the product, against float64 with the same stored weights; in ggml's rows, with the
    quantization of a normal weight in it. `of_floor` is the floor's time over the contender's: 1 is memory speed.
    """

    kernel: str
    device: str
    out: int
    in_: int
    bits: float
    group: int
    batch: int
    threads: int
    numerics: str
    us_p2: float
    us_p50: float
    us_p90: float
    floor_us_p2: float | None
    of_floor: float | None
    relative_error: float
    size_bytes: int
    weights: str
    samples: int
    isa: str
    torch: str
    load: float

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON, with the column name `in`."""
        return {("in" if key == "in_" else key): value for key, value in asdict(self).items()}


def cases(quick: bool) -> list[KernelCase]:
    """What is measured: one matrix if `quick`, else decoding, batches and prompts on one thread and on all."""
    if quick:
        return [KernelCase(4096, 4096, 1, 1, (2, 3, 4)), KernelCase(4096, 4096, 8, 1, (3,))]
    threads = torch.get_num_threads()
    found = [KernelCase(out, in_, 1, 1) for out, in_ in ((4096, 4096), (11008, 4096), (4096, 11008), (12288, 12288))]
    found += [KernelCase(4096, 4096, batch, 1) for batch in (4, 8, 16, 32, 128)]
    found.append(KernelCase(4096, 4096, 1, 1, resident=True))
    if threads > 1:
        found += [KernelCase(4096, 4096, batch, threads) for batch in (1, 8, 32)]
    return found


def random_weight(case: KernelCase, bits: int) -> PackedWeight:
    """Random planes, falling fp16 scales and an offset: every kernel's time is independent of the values."""
    generator = torch.Generator().manual_seed(bits)
    groups = -(-case.in_features // GROUP)
    shape = (bits, case.out_features, -(-case.in_features // 8))
    planes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    scales = torch.rand(bits, case.out_features, groups, generator=generator) + 0.5
    scales /= 2.0 ** torch.arange(bits)[:, None, None]
    offset = 0.1 * torch.randn(case.out_features, groups, generator=generator)
    return PackedWeight(planes, scales.half(), offset, case.in_features, GROUP)


def copies_of(size_bytes: int, case: KernelCase, footprint: int) -> int:
    """How many copies exceed every cache; two at least, so that a read does not warm what is multiplied next."""
    return 1 if case.resident else max(2, -(-footprint // size_bytes))


def ours(case: KernelCase, x: Tensor, footprint: int) -> Iterator[Contender]:
    """The native kernels at each number of planes, and BiQGEMM at three."""
    for bits in case.bits:
        weight = random_weight(case, bits)
        expected = x.double() @ weight.dequantize(torch.float64).t()
        for name, numerics, method in (("cpu-fast", "fast", "fast"), ("cpu-exact", "exact", "tables15")):
            yield _native(name, numerics, weight, method, case, x, expected, footprint)
        if bits == 3 and case.batch <= 8 and not case.resident:
            yield _native("biqgemm", "exact", weight, None, case, x, expected, footprint)


def _native(
    name: str,
    numerics: str,
    weight: PackedWeight,
    method: str | None,
    case: KernelCase,
    x: Tensor,
    expected: Tensor,
    footprint: int,
) -> Contender:
    first = native.pack(weight, "biqgemm" if method is None else "bcq")
    count = copies_of(first.size_bytes, case, footprint)
    memory = [first.data, *(native.aligned_empty(first.size_bytes).copy_(first.data) for _ in range(count - 1))]
    shape = (case.out_features, case.in_features)
    if method is None:
        weights = [native.NativeWeight(data, *shape, GROUP, weight.bits, torch.float16, True) for data in memory]

        def run(copy: int) -> Tensor:
            return native.biqgemm(x, weights[copy], case.threads)
    else:
        handles = [native.handle_of([data]) for data in memory]

        def run(copy: int) -> Tensor:
            return native.matmul(x, handles[copy], *shape, method, threads=case.threads)

    return Contender(name, weight.bits, GROUP, numerics, memory, run, expected, count, first.size_bytes)


def torch_contenders(case: KernelCase, x: Tensor, footprint: int) -> Iterator[Contender]:
    """torch's dense products in fp32 and bf16, and its 4-bit product where it has one."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(case.out_features, case.in_features, generator=generator)
    for name, dtype in (("torch-fp32", torch.float32), ("torch-bf16", torch.bfloat16)):
        weight, rows = dense.to(dtype), x.to(dtype)
        count = copies_of(weight.nbytes, case, footprint)
        memory = [weight, *(weight.clone() for _ in range(count - 1))]

        def run(copy: int, memory: list[Tensor] = memory, rows: Tensor = rows) -> Tensor:
            return F.linear(rows, memory[copy])

        expected = rows.double() @ weight.double().t()
        yield Contender(name, weight.element_size() * 8, 0, name[6:], memory, run, expected, count, weight.nbytes)
    codes = torch.randint(0, 16, dense.shape, dtype=torch.int32, generator=generator)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, RuntimeError):
        return
    groups = case.in_features // GROUP
    # In this order: scale, and the value of code 8.
    pairs = torch.stack([torch.rand(groups, case.out_features) + 0.5, torch.randn(groups, case.out_features)], -1)
    pairs, rows = pairs.bfloat16(), x.bfloat16()
    count = copies_of(packed.nbytes, case, footprint)
    memory = [packed, *(packed.clone() for _ in range(count - 1))]

    def run_int4(copy: int) -> Tensor:
        found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, memory[copy], GROUP, pairs)
        return found

    scale, middle = (part.double().t().repeat_interleave(GROUP, 1) for part in pairs.unbind(-1))
    expected = rows.double() @ ((codes.double() - 8) * scale + middle).t()
    size = packed.nbytes + pairs.nbytes
    yield Contender("torch-int4pack", 4, GROUP, "bf16", memory, run_int4, expected, count, size)


def measure(
    case: KernelCase,
    seconds: float,
    footprint: int,
    peers: Sequence[Callable[[KernelCase, Tensor, int], Iterator[Contender]]] = (),
) -> list[KernelRow]:
    """Times all contenders of a case in turns.

    Args:
        case: what to compare.
        seconds: for the case; every contender gets at least `MIN_SAMPLES` calls.
        footprint: bytes of weights per contender.
        peers: makers of further contenders.

    Raises:
        KernelError: there is no native library.
    """
    native.library()
    x = torch.randn(case.batch, case.in_features, generator=torch.Generator().manual_seed(9))
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        makers = (ours, torch_contenders, *peers)
        contenders = [contender for make in makers for contender in make(case, x, footprint)]
        errors = [_error(contender) for contender in contenders]
        times, floors = _take_turns(contenders, seconds, case.threads, case.resident)
    finally:
        torch.set_num_threads(before)
    return [
        _row(case, contender, error, sorted(own), sorted(floor))
        for contender, error, own, floor in zip(contenders, errors, times, floors, strict=True)
    ]


def _error(contender: Contender) -> float:
    found = contender.run(0)  # and a first call, before any is timed
    return float((found.double() - contender.expected).norm() / contender.expected.norm())


def _take_turns(
    contenders: Sequence[Contender], seconds: float, threads: int, resident: bool
) -> tuple[list[list[float]], list[list[float]]]:
    times: list[list[float]] = [[] for _ in contenders]
    floors: list[list[float]] = [[] for _ in contenders]
    end, turn = time.perf_counter() + seconds, 0
    order = random.Random(0)
    repeats = 3 if resident else 1  # the first of them brings the copy into the cache
    with torch.inference_mode():
        while turn < MIN_SAMPLES or time.perf_counter() < end:
            # No one always follows the same other: what that left in the caches would count as a property of both.
            for number in order.sample(range(len(contenders)), len(contenders)):
                contender = contenders[number]
                copy = turn % contender.copies
                if contender.memory is not None:
                    other = contender.memory[(copy + contender.copies // 2) % contender.copies]
                    floors[number].append(_timed(lambda: native.read_floor(other, threads), repeats))  # noqa: B023
                times[number].append(_timed(lambda: contender.run(copy), repeats))  # noqa: B023
            turn += 1
    return times, floors


def _timed(call: Callable[[], Any], repeats: int) -> float:
    elapsed = 0.0
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        elapsed = time.perf_counter() - begun
    return elapsed


def _row(case: KernelCase, contender: Contender, error: float, times: list[float], floors: list[float]) -> KernelRow:
    def microseconds(values: list[float], quantile: float) -> float:
        return round(1e6 * values[int(quantile * len(values))], 2)

    floor = microseconds(floors, 0.02) if floors else None
    fastest = microseconds(times, 0.02)
    return KernelRow(
        kernel=contender.kernel,
        device=cpu_name(),
        out=case.out_features,
        in_=case.in_features,
        bits=contender.bits,
        group=contender.group,
        batch=case.batch,
        threads=case.threads,
        numerics=contender.numerics,
        us_p2=fastest,
        us_p50=microseconds(times, 0.5),
        us_p90=microseconds(times, 0.9),
        floor_us_p2=floor,
        of_floor=None if floor is None else round(floor / fastest, 3),
        relative_error=float(f"{error:.3g}"),
        size_bytes=contender.size_bytes,
        weights="cache" if case.resident else "memory",
        samples=len(times),
        isa=native.isa_name(),
        torch=torch.__version__,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    )


def check_peers(names: Sequence[str], valid: Sequence[str]) -> None:
    """Refuses an unknown peer.

    Raises:
        KernelError: a name is not valid.
    """
    for name in names:
        if name not in valid:
            raise KernelError(f"peer {name!r} does not exist; valid: {', '.join(valid)}")
