"""Training losses as weighted sums; the engine divides by the global weight."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from hcx.config import Config
from hcx.data.batch import MicroBatch
from hcx.engine.base import ModelOutput, Objective


class NextTokenConfig(Config):
    """Every token of the text is predicted."""

    kind: Literal["next_token"] = "next_token"


class SFTConfig(Config):
    """Supervised tuning on conversations: the assistant's turns are predicted, all else is given."""

    kind: Literal["sft"] = "sft"


ObjectiveConfig = Annotated[NextTokenConfig | SFTConfig, Field(discriminator="kind")]


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


class SFT(NextToken):
    """`NextToken` over the assistant's tokens: which those are is in the micro-batch's weights.

    A target of weight 0 adds exactly nothing to the loss, and exactly zero to the gradient of its logits. A
    conversation of several turns therefore is the sum of its turns, each given what stands before it.
    """

    def __call__(self, output: ModelOutput, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of losses, `likely`: trained tokens with a probability above one half).

        A token more likely than one half is the most likely one, so `likely / weight` bounds the accuracy from below
        without logits of the whole vocabulary.
        """
        logprobs = output.token_logprobs(micro_batch.labels)
        likely = (micro_batch.weights * (logprobs.detach() > -math.log(2))).sum()
        return -(logprobs * micro_batch.weights).sum(), {"likely": likely}


def build_objective(config: NextTokenConfig | SFTConfig) -> Objective:
    """The loss that a recipe names."""
    return SFT() if isinstance(config, SFTConfig) else NextToken()
