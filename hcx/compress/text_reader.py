"""What a decoder makes of a text, read again and again while its later blocks change.

The hidden states at the input of one block are kept, so a reading costs only what comes after. The decoder's own
operations run in their order: a reading has the bits of a whole forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hcx.compress.divergence import UNNAMED
from hcx.data.batch import MicroBatch
from hcx.model.decoder import Decoder, Sublayer
from hcx.model.meta import ForwardMeta
from hcx.model.rope import rotary_tables

Losses = Mapping[str, float]
"""Domain (language) -> mean over its tokens, in nats."""
Objective = Literal["divergence", "loss"]
"""`loss`: the next token's, in nats. `divergence`: from what the full-precision model predicts: what the loss rises by
if the text is like the model's own, without the chance of the text that is in both models' losses."""
KEPT_PROBABILITIES = 1 << 28
"""Of the full-precision model, kept between readings: 1 GiB. Those of more text are computed again each time."""


class ScoredRow(NamedTuple):
    """The loss of one row of text: the sum over its counted tokens, in nats."""

    domain: str
    nats: float
    tokens: float


def by_domain(rows: Iterable[ScoredRow]) -> Losses:
    """Mean loss of each domain."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        total = sums.setdefault(row.domain, [0.0, 0.0])
        total[0] += row.nats
        total[1] += row.tokens
    return {domain: nats / tokens for domain, (nats, tokens) in sorted(sums.items())}


class TextReader:
    """A text and a decoder that changes.

    Args:
        decoder: with the weights that `divergence` is from.
        text: rows.
        objective: what is read.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, text: Sequence[MicroBatch], objective: Objective = "loss") -> None:
        self._decoder, self.text = decoder, text
        self._block, self._hidden = 0, self._enter()
        self._reference: list[_Prediction] | None = None
        if objective == "divergence":
            keep = sum(batch.tokens.numel() for batch in text) * decoder.config.vocab_size <= KEPT_PROBABILITIES
            self._reference = [_Prediction(decoder, decoder(batch.tokens, _meta(batch)), keep) for batch in text]

    @torch.no_grad()
    def keep(self, block: int) -> None:
        """What is before this block does not change from now on: its hidden states are kept."""
        if block < self._block:
            self._block, self._hidden = 0, self._enter()
        self._hidden = [
            self._run(hidden, batch, self._block, block) for hidden, batch in zip(self._hidden, self.text, strict=True)
        ]
        self._block = block

    @torch.no_grad()
    def rows(self) -> list[ScoredRow]:
        """Each row, from the kept block on."""
        found: list[ScoredRow] = []
        for number, (hidden, batch) in enumerate(zip(self._hidden, self.text, strict=True)):
            made = self._run(hidden, batch, self._block, self._decoder.config.num_layers)
            assert self._decoder.norm is not None
            found += self._score(self._decoder.norm(made), number)
        return found

    @torch.no_grad()
    def whole_rows(self) -> list[ScoredRow]:
        """The same by whole forward passes of the decoder."""
        made = (self._decoder(batch.tokens, _meta(batch)) for batch in self.text)
        return [row for number, hidden in enumerate(made) for row in self._score(hidden, number)]

    def _enter(self) -> list[Tensor]:
        return [self._decoder.embed(batch.tokens) for batch in self.text]

    def _run(self, hidden: Tensor, batch: MicroBatch, start: int, stop: int) -> Tensor:
        """Through the blocks from `start` to before `stop`, with the decoder's own operations in their order."""
        config = self._decoder.config
        rotary = rotary_tables(config, batch.positions, batch.tokens.shape[1], hidden)
        for index in range(2 * start, 2 * stop):
            sublayer: Sublayer = self._decoder.sublayers[index]  # type: ignore[assignment]
            branch = sublayer(hidden, _meta(batch), rotary)
            hidden = hidden + (branch * config.residual_multiplier if config.residual_multiplier != 1.0 else branch)
        return hidden

    def _score(self, hidden: Tensor, number: int) -> list[ScoredRow]:
        batch, output = self.text[number], self._decoder.output(hidden)
        weights = batch.weights.double()
        if self._reference is None:
            each = -output.token_logprobs(batch.labels).double()
        else:
            each = self._reference[number].divergence(output.logits()).double()
        nats, counted = (each * weights).sum(1), weights.sum(1)
        domains = batch.sources or (UNNAMED,) * len(nats)
        return [ScoredRow(*row) for row in zip(domains, nats.tolist(), counted.tolist(), strict=True)]


class _Prediction:
    """What full precision predicts of one batch; hidden states only where probabilities would fill the memory."""

    def __init__(self, decoder: Decoder, hidden: Tensor, keep: bool) -> None:
        self._decoder, self._hidden = decoder, hidden
        self._kept = self._probabilities() if keep else None

    def _probabilities(self) -> tuple[Tensor, Tensor]:
        """Probabilities `[batch, seq, vocab]`, and their negative entropy `[batch, seq]`."""
        logprobs = self._decoder.output(self._hidden).logits().log_softmax(-1)
        probabilities = logprobs.exp()
        return probabilities, (probabilities * logprobs).sum(-1)

    def divergence(self, logits: Tensor) -> Tensor:
        """`[batch, seq, vocab]` -> `[batch, seq]`: KL divergence from full precision, in nats."""
        probabilities, negative_entropy = self._kept or self._probabilities()
        return negative_entropy - torch.linalg.vecdot(probabilities, logits) + logits.logsumexp(-1)


def _meta(batch: MicroBatch) -> ForwardMeta:
    return ForwardMeta(positions=batch.positions, document_ids=batch.document_ids)
