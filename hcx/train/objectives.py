"""Training losses as weighted sums; the engine divides by the global weight."""

from __future__ import annotations

from torch import Tensor

from hcx.data.batch import MicroBatch
from hcx.engine.base import ModelOutput


class NextToken:
    """Cross entropy of the next token, in nats: `-sum w log p(label)` over `sum w`.

    The divisor is the weight of the *global* batch, so a token counts the same whatever the split into micro-batches,
    rows or ranks.
    """

    def weight(self, micro_batch: MicroBatch) -> float:
        """The sum of the target weights."""
        return float(micro_batch.weights.double().sum())

    def __call__(self, output: ModelOutput, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of losses, no further metrics)."""
        logprobs = output.token_logprobs(micro_batch.labels)
        return -(logprobs * micro_batch.weights).sum(), {}
