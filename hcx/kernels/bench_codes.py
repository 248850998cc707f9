"""Speed and efficiency of fixed-to-fixed codes on random bits; `hcx bench fixed-to-fixed` prints the rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from hcx.errors import KernelError
from hcx.kernels import gf2, native
from hcx.obs.machine import cpu_name

DECODES = 7
"""Timed decodings per case; the first of them is left out."""
TARGET_WEIGHTS, TARGET_PLANES = 100_000_000, 3
"""What an encoding time is also stated for."""


@dataclass(frozen=True)
class CodesCase:
    """What to encode: one plane of random bits under a random mask."""

    sparsity: float
    n_s: int
    weights: int = 8_000_000
    n_in: int = 8
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class CodesRow:
    """One measured case.

    Attributes:
        device, isa: where.
        sparsity, n_in, n_out, n_s, segment, weights, threads: the case.
        efficiency: share of kept bits that are right before correction.
        bits_per_bit: code words and corrections, per bit of the plane; the mask is not counted.
        encode_s: seconds for the plane.
        encode_core_s_100m_3: seconds of one core for 100 million weights in 3 planes, at this rate.
        decode_gb_per_s: of output, code words and corrections read, median.
        decode_gb_per_s_worst: the slowest of the timed runs.
        copy_gb_per_s: of a copy of the same output, timed in the same loop: the yardstick.
    """

    device: str
    isa: str
    sparsity: float
    n_in: int
    n_out: int
    n_s: int
    segment: int
    weights: int
    threads: int
    efficiency: float
    bits_per_bit: float
    encode_s: float
    encode_core_s_100m_3: float
    decode_gb_per_s: float
    decode_gb_per_s_worst: float
    copy_gb_per_s: float

    def as_dict(self) -> dict[str, object]:
        """For CSV and JSON."""
        return asdict(self)


def cases(quick: bool, weights: int | None = None, threads: int = 1) -> list[CodesCase]:
    """The usual cases: three sparsities by registers; two registers on fewer weights, they take 200 times as long."""
    if quick:
        return [CodesCase(0.9, 1, weights or 1_000_000, threads=threads)]
    found = []
    for sparsity in (0.9, 0.7, 0.5):
        for n_s in (0, 1, 2):
            found.append(CodesCase(sparsity, n_s, weights or (8_000_000 if n_s < 2 else 1_000_000), threads=threads))
    return found


def measure(case: CodesCase) -> CodesRow:
    """Encodes once, decodes several times, and checks that every kept bit came back.

    Raises:
        KernelError: there is no native library, a number is out of range, or a kept bit is wrong.
    """
    native.library()
    if case.weights < 1000 or case.threads < 1:
        raise KernelError(f"weights = {case.weights}, threads = {case.threads}; at least 1000 and 1")
    generator = np.random.default_rng(case.seed)
    size = -(-case.weights // 8)
    num_bits = 8 * size
    target = generator.integers(0, 256, size, dtype=np.uint8)
    mask = np.packbits(generator.random(num_bits) >= case.sparsity)
    network = gf2.Network.draw(case.n_in, gf2.code_rate_outputs(case.n_in, case.sparsity), case.n_s, case.seed)
    segment = gf2.SEGMENTS[case.n_s]
    begin = time.perf_counter()
    codes, errors = gf2.encode(target, mask, network, num_bits, segment, threads=case.threads)
    encode_s = time.perf_counter() - begin
    listed = gf2.corrections_of(gf2.decode(codes, network, num_bits, segment), target, mask, network, num_bits)

    def decode() -> gf2.Bytes:
        return gf2.correct(gf2.decode(codes, network, num_bits, segment, case.threads), listed, network, num_bits)

    decoded = decode()
    if ((decoded ^ target) & mask).any():
        raise KernelError("a kept bit did not come back")
    decodes, copies = [], []
    for _ in range(DECODES):
        decodes.append(_timed(decode))
        copies.append(_timed(decoded.copy))
    kept = int(np.unpackbits(mask).sum())
    return CodesRow(
        device=cpu_name(),
        isa=native.isa_name(),
        sparsity=case.sparsity,
        n_in=case.n_in,
        n_out=network.n_out,
        n_s=case.n_s,
        segment=segment,
        weights=num_bits,
        threads=case.threads,
        efficiency=1 - errors / max(kept, 1),
        bits_per_bit=8 * (codes.size + listed.size) / num_bits,
        encode_s=encode_s,
        encode_core_s_100m_3=encode_s / num_bits * TARGET_WEIGHTS * TARGET_PLANES * case.threads,
        decode_gb_per_s=size / statistics.median(decodes[1:]) / 1e9,
        decode_gb_per_s_worst=size / max(decodes[1:]) / 1e9,
        copy_gb_per_s=size / statistics.median(copies[1:]) / 1e9,
    )


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
