"""What a plan says about pruning, and how the planes of pruned weights are stored."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor

from hcx.compress.prune import Scope, importance, keep_mask, prune_with_gram, quantize_kept
from hcx.config import Config
from hcx.errors import ConfigError
from hcx.kernels.masked import EncodedWeight, FixedToFixed, MaskedWeight

Criterion = Literal["magnitude", "activation", "obs"]
Storage = Literal["auto", "raw", "fixed_to_fixed"]


def _check_sparsity(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError("allowed: above 0 and below 1 (0.7 prunes 70 % of the weights)")
    return value


def _check_n_in(value: int) -> int:
    if not 1 <= value <= 12:
        raise ValueError("allowed: 1 to 12")
    return value


class Pruning(Config):
    """Which weights go, and how what remains is stored."""

    sparsity: Annotated[float, AfterValidator(_check_sparsity)]
    """Share of the weights that are pruned."""
    criterion: Criterion = "magnitude"
    """`magnitude`; `activation` times what the weight multiplies; `obs` lets the weights that stay make up for it."""
    scope: Scope = "matrix"
    """Whether weights compete within the matrix, a row, or a group of a row."""
    storage: Storage = "auto"
    """`fixed_to_fixed` code words for the planes, `raw` planes, or whichever is smaller."""
    n_in: Annotated[int, AfterValidator(_check_n_in)] = 8
    """Bits of a code word."""
    registers: Literal[0, 1, 2] = 1
    """Earlier code words that take part in a block: 2 saves a little more and takes 200 times as long to encode."""

    @property
    def needs_inputs(self) -> bool:
        """Whether the criterion reads what the layer reads."""
        return self.criterion != "magnitude"

    def compress(
        self,
        weight: Tensor,
        bits: int,
        group_size: int,
        rounds: int,
        scale_dtype: torch.dtype,
        gram: Tensor | None = None,
    ) -> MaskedWeight | EncodedWeight:
        """Prunes, codes what stays, and stores it as asked.

        Args:
            weight: `[out, in]`, finite.
            bits, group_size, rounds, scale_dtype: of the quantizer.
            gram: `[in, in]`, mean of `x x^T` of the layer's inputs; for `activation` and `obs`.

        Raises:
            ConfigError: the criterion needs inputs that are not there, the weight cannot be coded, or code words were
                asked for and save nothing; with the numbers.
        """
        if self.needs_inputs and gram is None:
            raise ConfigError(f"prune.criterion = {self.criterion}: needs calibration text; or take magnitude")
        if self.criterion == "obs" and gram is not None:
            if self.scope == "group":
                raise ConfigError("prune.scope = group: with criterion obs, row or matrix")
            weight, kept = prune_with_gram(weight.float(), gram, self.sparsity, self.scope)
        else:
            scores = importance(weight, None if gram is None else gram.diagonal())
            kept = keep_mask(scores, self.sparsity, self.scope, group_size)
        masked = quantize_kept(weight, kept, bits, group_size, rounds, scale_dtype)
        if self.storage == "raw":
            return masked
        encoded = masked.encode(FixedToFixed(n_in=self.n_in, n_s=self.registers))
        if self.storage == "auto":
            return encoded if encoded.size_bytes < masked.size_bytes else masked
        if not encoded.saves_bytes:
            raise ConfigError(
                f"prune.storage = fixed_to_fixed saves nothing here: {encoded.summary()}. Prune more, take more "
                "planes, or leave prune out"
            )
        return encoded
