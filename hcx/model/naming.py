"""Canonical parameter names: those of Hugging Face's llama files, one name per unfused, unsharded tensor.

A fused or sharded local parameter is described as row ranges, each of them a rectangular block of a canonical tensor.
Checkpoints, exports, `edit_masters` and the optimizer groups all speak canonical names, so they hold for every engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CanonicalSlice:
    """A block of a canonical tensor that some rows of a local parameter hold.

    Attributes:
        name: canonical name, for example `model.layers.3.self_attn.q_proj.weight`.
        global_shape: shape of the whole canonical tensor.
        offset: where this block begins in it, one number per dimension.
        rows: `(start, stop)` rows (dim 0) of the local parameter that hold the block.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    rows: tuple[int, int]

    def view(self, local: Tensor) -> Tensor:
        """The block as a view of the local parameter (or of a tensor shaped like it)."""
        return local[self.rows[0] : self.rows[1]]


ParameterMap = dict[str, tuple[CanonicalSlice, ...]]
"""Local parameter name (as in `named_parameters()`) -> its blocks, in row order, covering every row."""
