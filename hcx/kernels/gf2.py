"""Codes that a network of XOR gates expands: fixed-to-fixed storage, and FleXOR, which is the case without registers.

`y_t = M_0 x_t + M_1 x_(t-1) + ... + M_(n_s) x_(t-n_s)` over GF(2), words before the beginning of a segment zero
(B. Park et al., Encoding Weights of Irregular Sparsity for Fixed-to-Fixed Model Compression, ICLR 2022; FleXOR: D. Lee
et al., NeurIPS 2020). `x_t` are code words of `n_in` bits, `y_t` blocks of `n_out` bits. The decoder is feed-forward
and linear, so any block can be decoded alone. kernels/FORMAT.md gives the layout of codes, networks and corrections.

Streams of bits are uint8 arrays, least significant bit first. The native library does the work where there is one, and
`gf2_reference` where there is none; both give the same bytes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcx.errors import KernelError
from hcx.kernels import gf2_reference, native

MAX_IN, MAX_OUT, MAX_REGISTERS = 16, 256, 3
MAX_SEARCHED_IN, MAX_STATE_BITS = 12, 16
"""Of the encoder where there are registers."""
CHUNK_BITS, OFFSET_BITS = gf2_reference.CHUNK_BITS, gf2_reference.OFFSET_BITS
SEGMENTS = (0, 4096, 256, 256)
"""Blocks between resets by number of registers: a megabyte of back-pointers for one register of 8 bits, 16 for two.

What resets cost falls with their distance (two registers, 90 % sparsity, 256 blocks: 0.1 points of efficiency)."""
_MAX_BACK_BYTES = 1 << 30

Bytes = NDArray[np.uint8]


class _Shape(ctypes.Structure):
    _fields_ = (
        ("bits", ctypes.c_int64),
        ("segment", ctypes.c_int64),
        ("n_in", ctypes.c_int32),
        ("n_out", ctypes.c_int32),
        ("n_s", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


@dataclass(frozen=True, eq=False)
class Network:
    """The XOR gates.

    Attributes:
        matrices: 0 and 1, uint8 `[n_s + 1, n_out, n_in]`; `matrices[j]` multiplies the word `j` blocks ago.
    """

    matrices: Bytes

    def __post_init__(self) -> None:
        shape = self.matrices.shape
        if self.matrices.dtype != np.uint8 or len(shape) != 3 or self.matrices.max(initial=0) > 1:
            raise KernelError(f"network: {self.matrices.dtype} {shape}; expected 0 and 1, uint8 [n_s + 1, n_out, n_in]")
        if not (1 <= shape[2] <= MAX_IN and 1 <= shape[1] <= MAX_OUT and 1 <= shape[0] <= MAX_REGISTERS + 1):
            raise KernelError(
                f"network: n_in = {shape[2]}, n_out = {shape[1]}, n_s = {shape[0] - 1}; allowed: 1 to {MAX_IN}, "
                f"1 to {MAX_OUT}, 0 to {MAX_REGISTERS}"
            )

    @property
    def n_in(self) -> int:
        """Bits of a code word."""
        return int(self.matrices.shape[2])

    @property
    def n_out(self) -> int:
        """Bits of a block."""
        return int(self.matrices.shape[1])

    @property
    def n_s(self) -> int:
        """Registers: how many earlier words take part in a block."""
        return int(self.matrices.shape[0]) - 1

    @cached_property
    def packed(self) -> Bytes:
        """As stored: rows of `M_0`, `M_1`, ..., of `ceil(n_in / 8)` bytes; bit `i` is the coefficient of input `i`."""
        return np.packbits(self.matrices, axis=2, bitorder="little").ravel()

    @classmethod
    def from_packed(cls, data: Bytes, n_in: int, n_out: int, n_s: int) -> Network:
        """Reads what `packed` gives.

        Raises:
            KernelError: sizes disagree or are out of range.
        """
        if not (1 <= n_in <= MAX_IN and 1 <= n_out <= MAX_OUT and 0 <= n_s <= MAX_REGISTERS):
            raise KernelError(
                f"network: n_in = {n_in}, n_out = {n_out}, n_s = {n_s}; allowed: 1 to {MAX_IN}, 1 to {MAX_OUT}, "
                f"0 to {MAX_REGISTERS}"
            )
        row_bytes = -(-n_in // 8)
        if data.dtype != np.uint8 or data.size != (n_s + 1) * n_out * row_bytes:
            raise KernelError(f"network: {data.size} bytes; expected {(n_s + 1) * n_out * row_bytes}")
        rows = data.reshape(n_s + 1, n_out, row_bytes)
        return cls(np.unpackbits(rows, axis=2, count=n_in, bitorder="little"))

    @classmethod
    def draw(cls, n_in: int, n_out: int, n_s: int, seed: int = 0) -> Network:
        """Fair random gates; a row of `M_0` without an input would be a wasted output and is drawn again."""
        generator = np.random.default_rng(seed)
        matrices = generator.integers(0, 2, (n_s + 1, n_out, n_in), dtype=np.uint8)
        while not (nonzero := matrices[0].any(axis=1)).all():
            matrices[0][~nonzero] = generator.integers(0, 2, (int((~nonzero).sum()), n_in), dtype=np.uint8)
        return cls(matrices)

    def blocks(self, num_bits: int) -> int:
        """Blocks of a stream."""
        return -(-num_bits // self.n_out)

    def code_bytes(self, num_bits: int) -> int:
        """Bytes of the code words of a stream."""
        return -(-self.blocks(num_bits) * self.n_in // 8)


def code_rate_outputs(n_in: int, sparsity: float) -> int:
    """`floor(n_in / (1 - sparsity))`, so that the code rate is the kept fraction; at most 256."""
    if not 0 <= sparsity < 1:
        raise KernelError(f"sparsity = {sparsity}; allowed: at least 0 and below 1")
    # 8 / (1 - 0.9) is 79.999... in binary.
    return min(MAX_OUT, int(n_in / (1 - sparsity) + 1e-9))


def decode(codes: Bytes, network: Network, num_bits: int, segment: int = 0, threads: int = 0) -> Bytes:
    """Expands code words to a stream.

    Args:
        codes: uint8, words of `n_in` bits one after the other.
        network: the gates.
        num_bits: of the stream; the last block may be cut short.
        segment: blocks between resets of the registers; 0: none.
        threads: at most; torch's number if 0.

    Returns:
        uint8 `[ceil(num_bits / 8)]`, unused bits 0.

    Raises:
        KernelError: sizes disagree.
    """
    _check_stream(num_bits, segment)
    if codes.dtype != np.uint8 or codes.size != network.code_bytes(num_bits):
        raise KernelError(
            f"codes: {codes.dtype} of {codes.size} bytes; {num_bits} bits in blocks of {network.n_out} need "
            f"{network.code_bytes(num_bits)} bytes"
        )
    if native.why_absent() is not None:
        return gf2_reference.decode(codes, network.matrices, num_bits, segment)
    codes, out = np.ascontiguousarray(codes), np.empty(-(-num_bits // 8), np.uint8)
    status = native.library().hcx_gf2_decode(
        ctypes.byref(_shape(network, num_bits, segment)),
        *_memory(network.packed),
        *_memory(codes),
        *_memory(out),
        threads or torch.get_num_threads(),
    )
    native.check(status, "decoding")
    return out


def encode(
    target: Bytes,
    mask: Bytes,
    network: Network,
    num_bits: int,
    segment: int = 0,
    isa: str = "best",
    threads: int = 0,
) -> tuple[Bytes, int]:
    """The code words with the fewest wrong bits where the mask is 1: exact dynamic programming, segment by segment.

    Args:
        target: uint8 `[ceil(num_bits / 8)]`, the bits wanted.
        mask: the same shape; 1 where a bit counts.
        network: the gates.
        num_bits: of the stream.
        segment: blocks between resets of the registers; 0: none.
        isa: a key of `native.ISAS`; all give the same words.
        threads: at most; torch's number if 0.

    Returns:
        The code words and how many kept bits differ.

    Raises:
        KernelError: sizes disagree, or the search would need more than 1 GiB for one segment.
    """
    _check_stream(num_bits, segment)
    size = -(-num_bits // 8)
    for name, stream in (("target", target), ("mask", mask)):
        if stream.dtype != np.uint8 or stream.size != size:
            raise KernelError(f"{name}: {stream.dtype} of {stream.size} bytes; {num_bits} bits need {size} bytes")
    state_bits = network.n_in * network.n_s
    if network.n_s > 0 and (network.n_in > MAX_SEARCHED_IN or state_bits > MAX_STATE_BITS):
        raise KernelError(
            f"n_in = {network.n_in}, n_s = {network.n_s}: the search takes words of at most {MAX_SEARCHED_IN} bits and "
            f"2^{MAX_STATE_BITS} states; take fewer registers or shorter words"
        )
    blocks = min(segment or network.blocks(num_bits), network.blocks(num_bits))
    if network.n_s > 0 and (blocks << state_bits) * 2 > _MAX_BACK_BYTES:
        raise KernelError(
            f"segment = {segment}: {blocks} blocks of 2^{state_bits} states need more than 1 GiB; "
            f"take segments of {SEGMENTS[network.n_s]} blocks"
        )
    target, mask = np.ascontiguousarray(target), np.ascontiguousarray(mask)
    if native.why_absent() is not None:
        return gf2_reference.encode(target, mask, network.matrices, num_bits, segment)
    codes, errors = np.empty(network.code_bytes(num_bits), np.uint8), ctypes.c_int64()
    status = native.library().hcx_gf2_encode(
        ctypes.byref(_shape(network, num_bits, segment)),
        *_memory(network.packed),
        target.ctypes.data,
        *_memory(mask),
        *_memory(codes),
        ctypes.byref(errors),
        native.code_of(isa, native.ISAS, "isa"),
        threads or torch.get_num_threads(),
    )
    native.check(status, "encoding")
    return codes, errors.value


def corrections_of(decoded: Bytes, target: Bytes, mask: Bytes, network: Network, num_bits: int) -> Bytes:
    """The list that turns the kept bits of a decoded stream into those wanted.

    For every 512 bits of whole blocks: a one and a 9-bit offset for each wrong bit, then a zero. So it takes exactly
    `10 * errors + ceil(n_out * blocks / 512)` bits, rounded up to bytes.
    """
    wrong = (decoded ^ target) & mask
    occupied = np.flatnonzero(wrong)
    bits = np.unpackbits(wrong[occupied, None], axis=1, bitorder="little")
    byte, bit = np.nonzero(bits)
    positions = occupied[byte] * 8 + bit
    chunks = -(-network.blocks(num_bits) * network.n_out // CHUNK_BITS)
    # The i-th wrong bit is behind i others and behind the ends of the chunks before its own.
    at = np.arange(positions.size) * (OFFSET_BITS + 1) + positions // CHUNK_BITS
    stream = np.zeros(positions.size * (OFFSET_BITS + 1) + chunks, np.uint8)
    stream[at] = 1
    for k in range(OFFSET_BITS):
        stream[at + 1 + k] = (positions % CHUNK_BITS) >> k & 1
    return np.packbits(stream, bitorder="little")


def correct(stream: Bytes, corrections: Bytes, network: Network, num_bits: int) -> Bytes:
    """Flips the listed bits of a decoded stream, in place, and returns it.

    Raises:
        KernelError: the list is cut short, out of order or out of range; the stream is then of no use.
    """
    if stream.dtype != np.uint8 or stream.size != -(-num_bits // 8) or not stream.flags.c_contiguous:
        raise KernelError(f"stream: {stream.dtype} of {stream.size} bytes; {num_bits} bits need {-(-num_bits // 8)}")
    if corrections.dtype != np.uint8 or corrections.size < 1:
        raise KernelError(f"corrections: {corrections.dtype} of {corrections.size} bytes; at least one is needed")
    if native.why_absent() is not None:
        return gf2_reference.correct(stream, corrections, network.n_out, num_bits)
    corrections = np.ascontiguousarray(corrections)
    status = native.library().hcx_gf2_correct(
        ctypes.byref(_shape(network, num_bits, 0)), *_memory(corrections), *_memory(stream)
    )
    native.check(status, "corrections")
    return stream


def transpose_bits(rows: Bytes) -> Bytes:
    """Bits of `[rows, bytes]` -> those of `[8 bytes, ceil(rows / 8)]`, padded with zeros."""
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.size == 0:
        raise KernelError(f"bits: {rows.dtype} {rows.shape}; expected uint8 [rows, bytes]")
    if native.why_absent() is not None:
        return np.packbits(np.unpackbits(rows, axis=1, bitorder="little").T, axis=1, bitorder="little")
    rows = np.ascontiguousarray(rows)
    out = np.empty((8 * rows.shape[1], -(-rows.shape[0] // 8)), np.uint8)
    status = native.library().hcx_bit_transpose(rows.ctypes.data, *rows.shape, *_memory(out))
    native.check(status, "transposing bits")
    return out


def _check_stream(num_bits: int, segment: int) -> None:
    if num_bits < 1 or segment < 0:
        raise KernelError(f"num_bits = {num_bits}, segment = {segment}; must be positive, and at least 0")


def _shape(network: Network, num_bits: int, segment: int) -> Any:
    return _Shape(num_bits, segment, network.n_in, network.n_out, network.n_s, 0)


def _memory(array: Bytes) -> tuple[int, int]:
    return array.ctypes.data, array.size
