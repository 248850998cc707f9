"""Plain NumPy beside the native GF(2) code: slow, and simple enough to be seen right.

It serves where no compiler was present, and the native library is tested against it: the same words, not merely the
same number of errors, because ties are broken alike (the smallest oldest word; at the end the smallest state).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hcx.errors import KernelError

CHUNK_BITS, OFFSET_BITS = 512, 9
_TILE_BLOCKS = 1 << 14
_UNREACHABLE = 1 << 30

Bytes = NDArray[np.uint8]


def decode(codes: Bytes, matrices: Bytes, num_bits: int, segment: int) -> Bytes:
    """See `gf2.decode`: the sum of matrix products, modulo 2."""
    _, n_out, n_in = matrices.shape
    blocks = -(-num_bits // n_out)
    words = np.unpackbits(codes, count=blocks * n_in, bitorder="little").reshape(blocks, n_in)
    bits = np.empty((blocks, n_out), np.uint8)
    for begin in range(0, blocks, _TILE_BLOCKS):
        index = np.arange(begin, min(begin + _TILE_BLOCKS, blocks))
        total = np.zeros((index.size, n_out), np.float32)  # sums of at most 64 ones are exact
        for j, matrix in enumerate(matrices):
            inside = (index % segment if segment else index) >= j
            earlier = words[np.maximum(index - j, 0)] * inside[:, None].astype(np.uint8)
            total += earlier.astype(np.float32) @ matrix.T.astype(np.float32)
        bits[begin : begin + index.size] = total.astype(np.int32) & 1
    return np.packbits(bits.ravel()[:num_bits], bitorder="little")


def encode(target: Bytes, mask: Bytes, matrices: Bytes, num_bits: int, segment: int) -> tuple[Bytes, int]:
    """See `gf2.encode`: a Viterbi search that compares every word with every state."""
    registers, n_out, n_in = matrices.shape
    n_s, count = registers - 1, 1 << n_in
    blocks = -(-num_bits // n_out)
    wanted, counts = (_padded(stream, num_bits, blocks * n_out).reshape(blocks, n_out) for stream in (target, mask))
    words = (np.arange(count)[:, None] >> np.arange(n_in) & 1).astype(np.uint8)
    # [j][word][output]: what each word adds to a block j blocks later.
    parts = np.stack([words @ matrix.T & 1 for matrix in matrices])
    found, errors = np.empty(blocks, np.int64), 0
    step = segment or blocks
    for begin in range(0, blocks, step):
        end = min(begin + step, blocks)
        chosen, cost = _search(parts, wanted[begin:end], counts[begin:end].astype(bool), n_in, n_s)
        found[begin:end] = chosen
        errors += cost
    bits = (found[:, None] >> np.arange(n_in) & 1).astype(np.uint8)
    return np.packbits(bits.ravel(), bitorder="little"), errors


def _search(
    parts: Bytes, wanted: Bytes, counts: NDArray[np.bool_], n_in: int, n_s: int
) -> tuple[NDArray[np.int64], int]:
    count, states = 1 << n_in, 1 << (n_in * n_s)
    between = states >> n_in  # states of all registers but the oldest
    if n_s == 0:
        wrong = np.stack([((parts[0] ^ row) & keep).sum(1) for row, keep in zip(wanted, counts, strict=True)])
        return wrong.argmin(1), int(wrong.min(1).sum())
    costs = np.full(states, _UNREACHABLE, np.int64)
    costs[0] = 0
    back = np.empty((len(wanted), states), np.int64)
    for t, (row, keep) in enumerate(zip(wanted, counts, strict=True)):
        last = parts[n_s][:, keep]
        following = np.empty(states, np.int64)
        for r in range(between):
            middle = row[keep].copy()
            for j in range(1, n_s):
                middle ^= parts[j][r >> (n_in * (j - 1)) & (count - 1)][keep]
            # [x][z]: the cost of word x where z is the oldest word.
            distance = (parts[0][:, None, keep] ^ middle ^ last[None]).sum(2, dtype=np.int64)
            total = costs[np.arange(count) * between + r][None, :] + distance
            here = np.arange(count) + (r << n_in)
            back[t, here] = total.argmin(1)
            following[here] = total.min(1)
        costs = following
    state = int(costs.argmin())
    best, chosen = int(costs[state]), np.empty(len(wanted), np.int64)
    for t in range(len(wanted) - 1, -1, -1):
        chosen[t] = state & (count - 1)
        state = state >> n_in | int(back[t, state]) << (n_in * (n_s - 1))
    return chosen, best


def _padded(stream: Bytes, num_bits: int, size: int) -> Bytes:
    bits = np.zeros(size, np.uint8)
    bits[:num_bits] = np.unpackbits(stream, count=num_bits, bitorder="little")
    return bits


def correct(stream: Bytes, corrections: Bytes, n_out: int, num_bits: int) -> Bytes:
    """See `gf2.correct`: reads the list flag by flag."""
    bits = np.unpackbits(corrections, bitorder="little")
    weights = 1 << np.arange(OFFSET_BITS)
    at = 0
    for chunk in range(-(-(-(-num_bits // n_out) * n_out) // CHUNK_BITS)):
        earlier = -1
        while True:
            if at >= bits.size:
                raise KernelError("corrections: the encoded stream is damaged or cut short")
            more, at = bits[at], at + 1
            if not more:
                break
            position = chunk * CHUNK_BITS + int((bits[at : at + OFFSET_BITS] * weights[: bits.size - at]).sum())
            at += OFFSET_BITS
            if at > bits.size or not earlier < position < num_bits:
                raise KernelError("corrections: the encoded stream is damaged or cut short")
            stream[position // 8] ^= 1 << position % 8
            earlier = position
    if bits.size - at >= 8 or bits[at:].any():
        raise KernelError("corrections: the encoded stream is damaged or cut short")
    return stream
