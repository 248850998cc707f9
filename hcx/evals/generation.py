"""Greedy continuation with stop strings, for `generate_until`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hcx.model.decoder import Decoder


class Host(Protocol):
    """What continuing needs of the adapter."""

    decoder: Decoder

    @property
    def eot_token_id(self) -> int:
        """End of text."""

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""

    def _hidden(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """Final hidden states of right-padded rows."""


@dataclass
class Continuation:
    """A prompt and what has been generated after it."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    done: bool = False


@torch.no_grad()
def continue_greedily(host: Host, rows: list[Continuation], until: Sequence[str], limit: int) -> None:
    """Appends the most likely token to every row until a stop string, the end of text or `limit` tokens."""
    for _ in range(limit):
        open_rows = [row for row in rows if not row.done]
        if not open_rows:
            return
        inputs = [row.prompt + row.tokens for row in open_rows]
        hidden = host._hidden(inputs)
        last = torch.tensor([len(i) - 1 for i in inputs], device=hidden.device)
        picked = hidden[last, torch.arange(len(inputs), device=hidden.device)].unsqueeze(1)
        chosen = host.decoder.output(picked).logits()[0].argmax(-1).tolist()
        for row, token in zip(open_rows, chosen, strict=True):
            row.tokens.append(token)
            row.done = token == host.eot_token_id or ends(host, row.tokens, until)


def ends(host: Host, tokens: Sequence[int], until: Sequence[str]) -> bool:
    """Whether the text so far contains a stop string."""
    text = host.tok_decode(tokens, skip_special_tokens=False)
    return any(stop and stop in text for stop in until)
