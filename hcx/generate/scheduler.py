"""Continuous batching: requests join and leave while others run (Yu et al., Orca, OSDI 2022).

The cache's first rows hold requests that generate, the next ones requests whose prompt is being read. A step reads at
most `prefill_tokens` of prompts, then adds one token to every generating request. Rows are kept dense by moving the
last one into a gap, so that a step works on a slice of the cache and never copies it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from hcx.errors import ConfigError
from hcx.generate.cache import ContiguousKVCache
from hcx.generate.request import FinishReason, Piece, Request, TokenLogprob, check_prompt
from hcx.generate.sampling import sample
from hcx.generate.step import Steps
from hcx.model.config import ModelConfig

SCORED_AT_ONCE = 128
"""Prompt positions whose logits exist at the same time; a whole prompt's would be gigabytes."""


class Scheduler:
    """Runs requests on one model. Not thread-safe: one thread owns it.

    Args:
        steps: what computes.
        config: shape of the model.
        cache: one row per running request.
        prefill_tokens: prompt tokens read per step; bounds how long others wait for a long prompt.
        routed: rows may belong to different tasks. All of them then go the same way, also the base model's: an answer
            does not depend on who else is in the batch.
    """

    def __init__(
        self,
        steps: Steps,
        config: ModelConfig,
        cache: ContiguousKVCache,
        prefill_tokens: int = 512,
        routed: bool = False,
    ) -> None:
        if prefill_tokens < 1:
            raise ConfigError(f"prefill_tokens = {prefill_tokens}; must be at least 1")
        self.steps, self.config, self.cache = steps, config, cache
        self.prefill_tokens, self._routed = prefill_tokens, routed
        self.device = cache.keys.device
        self.waiting: deque[Request] = deque()
        self.rows: list[Request] = []
        self._generating = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.rows or self.waiting)

    def submit(self, request: Request) -> None:
        """Queues a request; it joins at the next step if a row is free.

        Raises:
            ConfigError: the prompt is empty, too long, or outside the vocabulary.
        """
        check_prompt(request.prompt, request.params, self.config.vocab_size, self.cache.max_seq)
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Drops a request; its row is free at once."""
        request.cancelled = True
        if request in self.rows:
            self._remove(self.rows.index(request))
        elif request in self.waiting:
            self.waiting.remove(request)

    def clear(self) -> list[Request]:
        """Drops everything; returns what was dropped."""
        dropped = [*self.rows, *self.waiting]
        self.rows.clear()
        self.waiting.clear()
        self._generating = 0
        return dropped

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, Piece]]:
        """Reads some prompts and adds a token to every generating request.

        Returns:
            What each request gained. A request whose piece has a `finish_reason` has left.
        """
        while self.waiting and len(self.rows) < self.cache.rows:
            self.rows.append(self.waiting.popleft())
        # First those that generate: a request whose prompt ends in this step gets one token in it, not two.
        pieces = self._decode() if self._generating else []
        if self._generating < len(self.rows):
            pieces += self._prefill()
        for request, piece in pieces:
            if piece.finish_reason is not None:
                self._remove(self.rows.index(request))
        return pieces

    def _decode(self) -> list[tuple[Request, Piece]]:
        requests = self.rows[: self._generating]
        positions = [request.length for request in requests]
        view = self.cache.view(0, len(requests), max(positions) + 1)
        tokens = self._tensor([request.newest for request in requests])
        logits = self.steps.decode_step(tokens, self._tensor(positions), view, self._task_ids(requests))
        return self._accept(requests, logits)

    def _prefill(self) -> list[tuple[Request, Piece]]:
        first = self._generating
        # Rows beyond the step's budget wait for a later step rather than making every chunk tiny.
        requests = self.rows[first : first + self.prefill_tokens]
        remaining = [len(request.prompt) - request.computed for request in requests]
        width = min(max(remaining), max(self.prefill_tokens // len(requests), 1))
        counts = [min(count, width) for count in remaining]
        tokens, positions = [], []
        for request, count in zip(requests, counts, strict=True):
            padding = width - count
            tokens.append([*request.prompt[request.computed : request.computed + count], *[0] * padding])
            places = range(request.computed, request.computed + count)
            positions.append([*places, *[self.cache.scratch] * padding])
        length = max(request.computed + count for request, count in zip(requests, counts, strict=True))
        view = self.cache.view(first, len(requests), length)
        hidden = self.steps.prefill(self._tensor(tokens), self._tensor(positions), view, self._task_ids(requests))
        read, last = [], []
        for row, (request, count) in enumerate(zip(requests, counts, strict=True)):
            if request.params.prompt_logprobs is not None:
                self._score(request, hidden[:count, row])
            request.computed += count
            if request.computed == len(request.prompt):
                read.append(request)
                last.append(hidden[count - 1, row])
        if not read:
            return []
        for request in read:
            self._promote(request)
        pieces = [(request, self._scored(request)) for request in read if request.params.max_tokens == 0]
        wanted = [number for number, request in enumerate(read) if request.params.max_tokens > 0]
        if wanted:
            logits = self.steps.logits(torch.stack([last[number] for number in wanted]))
            pieces += self._accept([read[number] for number in wanted], logits)
        return pieces

    def _score(self, request: Request, hidden: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow these positions."""
        alternatives = request.params.prompt_logprobs or 0
        if not request.prompt_logprobs:
            request.prompt_logprobs.append(TokenLogprob(request.prompt[0], None))
        labels = request.prompt[request.computed + 1 : request.computed + 1 + len(hidden)]
        for start in range(0, len(labels), SCORED_AT_ONCE):
            chunk = labels[start : start + SCORED_AT_ONCE]
            logits = self.steps.logits(hidden[start : start + len(chunk)])
            request.prompt_logprobs += token_logprobs(logits, chunk, alternatives)

    def _scored(self, request: Request) -> Piece:
        request.finish_reason = "length"
        return Piece(finish_reason="length")

    def _accept(self, requests: list[Request], logits: Tensor) -> list[tuple[Request, Piece]]:
        """Chooses each request's next token."""
        tokens = sample(logits, [request.sampler for request in requests]).tolist()
        wanted = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if wanted:
            most = max(requests[row].params.logprobs or 0 for row in wanted)
            found = token_logprobs(logits[wanted], [tokens[row] for row in wanted], most)
            for row, entry in zip(wanted, found, strict=True):
                top = entry.top[: requests[row].params.logprobs]
                logprobs[row] = TokenLogprob(entry.token, entry.logprob, top)
        return [
            (request, self._append(request, tokens[row], logprobs.get(row))) for row, request in enumerate(requests)
        ]

    def _append(self, request: Request, token: int, logprob: TokenLogprob | None) -> Piece:
        request.tokens.append(token)
        request.sampler.record(token)
        if logprob is not None:
            request.logprobs.append(logprob)
        text = ""
        reason: FinishReason | None = None
        if token in request.stop_ids:
            reason = "stop"
        elif request.stream is not None:
            text = request.stream.push(token)
        if reason is None and len(request.tokens) >= request.params.max_tokens:
            reason = "length"
        if request.stream is not None:
            if reason is not None:
                text += request.stream.finish()
            if request.stream.stopped is not None:
                reason = "stop"
        request.finish_reason = reason
        return Piece(text, (token,), () if logprob is None else (logprob,), reason)

    def _promote(self, request: Request) -> None:
        """Makes a request whose prompt has been read one of the generating."""
        row, target = self.rows.index(request), self._generating
        if row != target:
            other = self.rows[target]
            self.cache.swap(row, target, max(request.length, other.length))
            self.rows[row], self.rows[target] = other, request
        self._generating += 1

    def _remove(self, row: int) -> None:
        if row < self._generating:
            self._generating -= 1
            row = self._fill(row, self._generating)
        self._fill(row, len(self.rows) - 1)
        self.rows.pop()

    def _fill(self, gap: int, source: int) -> int:
        """Moves a row into the gap; returns where the gap is then."""
        if gap != source:
            self.cache.move(source, gap, self.rows[source].length)
            self.rows[gap] = self.rows[source]
        return source

    def _task_ids(self, requests: list[Request]) -> Tensor | None:
        # On the host: which rows go to which weights is decided there.
        return torch.tensor([request.task for request in requests]) if self._routed else None

    def _tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def token_logprobs(logits: Tensor, labels: Iterable[int], alternatives: int) -> list[TokenLogprob]:
    """Log-probabilities of labels, with the most likely alternatives.

    Args:
        logits: `[n, vocab]` fp32.
        labels: n token ids.
        alternatives: how many of the most likely tokens to name.
    """
    labels = list(labels)
    # The same subtraction for both, so that a label that is the most likely token has exactly its log-probability.
    normaliser = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, torch.tensor(labels, device=logits.device)[:, None]) - normaliser)[:, 0].tolist()
    values, tokens = logits.topk(min(alternatives, logits.shape[-1]), dim=-1)
    values = values - normaliser
    return [
        TokenLogprob(label, value, tuple(zip(row_tokens, row_values, strict=True)))
        for label, value, row_tokens, row_values in zip(labels, chosen, tokens.tolist(), values.tolist(), strict=True)
    ]
