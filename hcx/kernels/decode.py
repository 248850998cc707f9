"""The door to the native decoding step: one call takes one token of every row through all blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcx.errors import KernelError
from hcx.kernels import native
from hcx.kernels.native import NativeWeight, check, code_of


class _Sublayer(ctypes.Structure):
    _fields_ = (
        ("norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("outer", ctypes.c_void_p),
        ("inner_count", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("sublayers", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("positions", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("residual_multiplier", ctypes.c_float),
        ("reserved", ctypes.c_float),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("layer_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("place_stride", ctypes.c_int64),
        ("places", ctypes.c_int64),
    )


@dataclass(frozen=True)
class StepShape:
    """The sizes and factors of a decoder.

    Attributes:
        hidden, intermediate: of the residual stream and of the MLP.
        heads, kv_heads, head_dim: of the attention.
        eps: of the norms.
        attention_scale: factor of the scores.
        residual_multiplier: factor of what a branch adds.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    attention_scale: float
    residual_multiplier: float


@dataclass(frozen=True)
class StepBranch:
    """One residual branch.

    Attributes:
        norm: fp32 `[hidden]`.
        post_norm: fp32 `[hidden]`, or None.
        inner: q, k and v, or gate and up, in this order; they share their group size.
        outer: o, or down.
    """

    norm: Tensor
    post_norm: Tensor | None
    inner: tuple[NativeWeight, ...]
    outer: NativeWeight


class NativeDecoder:
    """A decoder's binary-coded blocks, ready for the native step.

    Args:
        shape: of the decoder.
        branches: attention and MLP of each block in turns.
        norm: fp32 `[hidden]`, after the last block.
        method: of the products, a key of `native.METHODS`.

    Raises:
        KernelError: a tensor is not contiguous fp32 on the CPU.
    """

    def __init__(self, shape: StepShape, branches: Sequence[StepBranch], norm: Tensor, method: str) -> None:
        vectors = [norm, *(one for branch in branches for one in (branch.norm, branch.post_norm) if one is not None)]
        for vector in vectors:
            native.require(vector, torch.float32, (shape.hidden,))
        self.shape = shape
        self._method = code_of(method, native.METHODS, "method")
        # Everything that the structures point at is kept with them.
        self._kept: list[Any] = [vectors, list(branches)]
        self._sublayers = (_Sublayer * len(branches))(*(self._sublayer(branch) for branch in branches))
        self._norm, self._layers = norm, len(branches) // 2

    def _sublayer(self, branch: StepBranch) -> _Sublayer:
        first, *others = branch.inner
        inner = first.group_handle(others) if others else first.handle
        outer = branch.outer.handle
        self._kept += [inner, outer]
        return _Sublayer(
            branch.norm.data_ptr(),
            None if branch.post_norm is None else branch.post_norm.data_ptr(),
            ctypes.addressof(inner),
            ctypes.addressof(outer),
            len(branch.inner),
            0,
        )

    def step(
        self,
        hidden: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        cosines: Tensor,
        sines: Tensor,
        isa: str = "best",
    ) -> None:
        """One token for every row.

        Args:
            hidden: fp32 `[batch, hidden]`, embeddings; becomes the hidden states after the final norm.
            positions: int64 `[batch]`.
            keys, values: fp32 `[layers, batch, places, kv_heads, head_dim]`, heads contiguous; get the new ones.
            cosines, sines: fp32 `[positions, head_dim / 2]`.
            isa: a key of `native.ISAS`; forced down to what the CPU has.

        Raises:
            KernelError: shapes, types or layouts disagree, or a position is beyond the cache or the tables.
        """
        shape, batch = self.shape, hidden.shape[0]
        native.require(hidden, torch.float32, (batch, shape.hidden))
        native.require(positions, torch.int64, (batch,))
        for table in (cosines, sines):
            native.require(table, torch.float32, (cosines.shape[0], shape.head_dim // 2))
        expected = (self._layers, batch, keys.shape[2], shape.kv_heads, shape.head_dim)
        for stored in (keys, values):
            place = (shape.head_dim, 1)
            if (
                tuple(stored.shape) != expected
                or stored.dtype != torch.float32
                or stored.stride()[3:] != place
                or stored.stride() != keys.stride()
                or stored.device.type != "cpu"
            ):
                raise KernelError(
                    f"a cache {stored.dtype} {tuple(stored.shape)}, strides {stored.stride()}; expected torch.float32 "
                    f"{expected} with contiguous heads"
                )
        cache = _Cache(keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], keys.shape[2])
        decoder = _Decoder(
            self._layers,
            shape.hidden,
            shape.intermediate,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            ctypes.addressof(self._sublayers),
            self._norm.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            cosines.shape[0],
            shape.eps,
            shape.attention_scale,
            shape.residual_multiplier,
            0.0,
        )
        status = native.library().hcx_decode_step(
            ctypes.byref(decoder),
            ctypes.byref(cache),
            positions.data_ptr(),
            batch,
            hidden.data_ptr(),
            self._method,
            code_of(isa, native.ISAS, "isa"),
            torch.get_num_threads(),
        )
        check(status, "decoding a token")
