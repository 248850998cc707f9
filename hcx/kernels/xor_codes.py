"""Bit planes stored as code words that a network of XOR gates expands (FleXOR: Lee et al., NeurIPS 2020).

Block `t` of a stream is `M x_t` over GF(2), with code words `x_t` of `n_in` bits one after the other and blocks of
`n_out` bits, both least significant bit first. The blocks of a weight run along the inputs of one row; surplus bits at
the end of a row are dropped. Decoding happens at load, so kernels see ordinary planes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import gf2_reference

KIND = "flexor"
Bits = NDArray[np.uint8]


def decode_stream(codes: Bits, matrix: Bits, num_blocks: int) -> Bits:
    """Code words to a stream: `[bytes]` and `[n_out, n_in]` -> bits `[num_blocks * n_out]`, one per element."""
    n_in = matrix.shape[1]
    if codes.dtype != np.uint8 or codes.size != -(-num_blocks * n_in // 8):
        raise KernelError(f"codes: {codes.dtype} of {codes.size} bytes; {num_blocks} words of {n_in} bits are needed")
    # In NumPy: networks here may have more outputs than the native decoder takes.
    num_bits = num_blocks * matrix.shape[0]
    stream = gf2_reference.decode(codes, matrix[None], num_bits, segment=0)
    return np.unpackbits(stream, count=num_bits, bitorder="little")


def pack_words(words: Bits) -> Bits:
    """Bits `[num_blocks, n_in]` to bytes."""
    return np.packbits(words.ravel(), bitorder="little")


def describe(networks: Sequence[Bits]) -> dict[str, Any]:
    """The entry `encoding` of a module's description: one network `[n_out, n_in]` per plane."""
    n_out, n_in = networks[0].shape
    rows = [np.packbits(matrix, axis=1, bitorder="little").tobytes().hex() for matrix in networks]
    return {"kind": KIND, "n_in": int(n_in), "n_out": int(n_out), "networks": rows}


def decode_planes(stem: str, codes: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The planes uint8 `[q, out, ceil(in / 8)]` of a weight whose entry has an `encoding`.

    Args:
        stem: for messages.
        codes: uint8 `[q, bytes]`.
        entry: of the module.

    Raises:
        KernelError: another kind of encoding, or sizes disagree.
    """
    stated = entry["encoding"]
    if stated.get("kind") != KIND:
        raise KernelError(f"{stem}: encoding {stated.get('kind')!r} is not supported; supported: {KIND!r}")
    try:
        n_in, n_out = int(stated["n_in"]), int(stated["n_out"])
        rows, columns = int(entry["out_features"]), int(entry["in_features"])
        networks = [
            np.unpackbits(
                np.frombuffer(bytes.fromhex(text), np.uint8).reshape(n_out, -1), axis=1, count=n_in, bitorder="little"
            )
            for text in stated["networks"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise KernelError(f"{stem}: the encoding's description is damaged ({error})") from None
    if codes.dim() != 2 or codes.shape[0] != len(networks):
        raise KernelError(f"{stem}: codes are {tuple(codes.shape)} for {len(networks)} networks")
    blocks = -(-columns // n_out)
    planes = []
    for code, matrix in zip(codes.cpu().numpy(), networks, strict=True):
        try:
            bits = decode_stream(code, matrix, rows * blocks)
        except KernelError as error:
            raise KernelError(f"{stem}: {error}") from None
        planes.append(np.packbits(bits.reshape(rows, blocks * n_out)[:, :columns], axis=1, bitorder="little"))
    return torch.from_numpy(np.stack(planes))
