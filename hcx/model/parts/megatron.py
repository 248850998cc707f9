"""Tensor-parallel parts on megatron-core's communication regions.

Column- and row-parallel linears are the plain ones between two regions of `megatron.core.tensor_parallel`, so that
every weight source (dense, LoRA, quantized) keeps its tensor parallelism. The library's own linear classes are not
used: they own their weight, and hold no other kind of it.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():
    # Without Transformer Engine or Apex the library announces its torch fallbacks, once per module.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )
from hcx.model.parts.base import Parts
from hcx.model.parts.logprobs import VocabularyShard, chunked_token_logprobs


class MegatronParts(Parts):
    """Parts of one rank of the current tensor-parallel group (`parallel_state` must be initialised).

    Args:
        sequence_parallel: split norms and residuals along the sequence: `[seq / tp_size, batch, hidden]`.
        dtype, device: of the parameters.
    """

    def __init__(
        self, sequence_parallel: bool, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(dtype, device)
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.sequence_parallel = sequence_parallel and self.tp_size > 1

    def enter_column(self, x: Tensor) -> Tensor:
        """The whole sequence; the backward sums (or sums and scatters) the ranks' gradients."""
        if self.tp_size == 1:
            return x
        if self.sequence_parallel:
            gathered: Tensor = gather_from_sequence_parallel_region(x)
            return gathered
        copied: Tensor = copy_to_tensor_model_parallel_region(x)
        return copied

    def exit_row(self, y: Tensor) -> Tensor:
        """The sum over ranks; under sequence parallelism this rank's part of it."""
        if self.tp_size == 1:
            return y
        if self.sequence_parallel:
            scattered: Tensor = reduce_scatter_to_sequence_parallel_region(y)
            return scattered
        reduced: Tensor = reduce_from_tensor_model_parallel_region(y)
        return reduced

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Tokens `[batch, seq]` -> `[seq (or its part), batch, hidden]`: each rank adds the rows that it holds."""
        if self.tp_size == 1:
            return super().embed(tokens, weight)
        rows = weight.shape[0]
        local = tokens.t() - self.tp_rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0.0)
        return self.exit_row(found)

    def enter_output(self, hidden: Tensor) -> Tensor:
        """As `enter_column`: the output matrix is split by rows."""
        return self.enter_column(hidden)

    def gather_logits(self, logits: Tensor) -> Tensor:
        """`[..., local vocab]` -> `[..., vocab]`."""
        if self.tp_size == 1:
            return logits
        gathered: Tensor = gather_from_tensor_model_parallel_region(logits)
        return gathered

    def token_logprobs(self, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Vocabulary-parallel and chunked; two numbers per token travel between ranks."""
        if self.tp_size == 1:
            return super().token_logprobs(hidden, weight, labels, scale)
        shard = VocabularyShard(first=self.tp_rank * weight.shape[0], combine=_combine)
        return chunked_token_logprobs(hidden, weight, labels, scale, shard)


def _combine(normaliser: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """(log-normalisers, label logits) over this rank's rows `[n]` -> over the whole vocabulary."""
    group = parallel_state.get_tensor_model_parallel_group()
    largest = normaliser.clone()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    sums = torch.stack([(normaliser - largest).exp(), picked])
    torch.distributed.all_reduce(sums, group=group)
    return sums[0].log() + largest, sums[1]
