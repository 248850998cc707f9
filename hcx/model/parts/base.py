"""`Parts`: how a decoder's pieces are sharded and where they communicate.

The class below is the plain case, one rank that holds everything. An engine with tensor parallelism subclasses it and
overrides the sizes and the region operations; modules and their arithmetic stay the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcx.model.parts.logprobs import chunked_token_logprobs


class Parts:
    """Plain torch parts on one rank.

    Attributes:
        tp_size, tp_rank: tensor-parallel ranks that share each matrix, and this one's number.
        sequence_parallel: norms and residuals are split along dim 0 over the tensor-parallel ranks.
        dtype, device: of the parameters.
    """

    tp_size: int = 1
    tp_rank: int = 0
    sequence_parallel: bool = False

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.dtype = dtype
        self.device = torch.device(device)

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter of local shape."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device))

    def sequence_length(self, hidden: Tensor) -> int:
        """Length of the whole sequence, given hidden states `[local seq, batch, hidden]`."""
        return hidden.shape[0] * (self.tp_size if self.sequence_parallel else 1)

    # Regions: identity on one rank; an engine puts its collectives here.

    def enter_column(self, x: Tensor) -> Tensor:
        """Before a column-parallel linear: the whole sequence, with gradients summed over ranks."""
        return x

    def exit_row(self, y: Tensor) -> Tensor:
        """After a row-parallel linear: the sum over ranks."""
        return y

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Rows of a vocabulary-parallel embedding: tokens `[batch, seq]` -> `[seq, batch, hidden]`."""
        return F.embedding(tokens.transpose(0, 1), weight)

    def enter_output(self, hidden: Tensor) -> Tensor:
        """Before the vocabulary-parallel output."""
        return hidden

    def gather_logits(self, logits: Tensor) -> Tensor:
        """`[..., local vocab]` -> `[..., vocab]`."""
        return logits

    def token_logprobs(self, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Log-probabilities of labels: hidden `[n, hidden]`, weight `[local vocab, hidden]`, labels `[n]` -> `[n]`."""
        return chunked_token_logprobs(hidden, weight, labels, scale)


PlainParts = Parts
"""The parts of the `torch` and `deepspeed` engines."""
