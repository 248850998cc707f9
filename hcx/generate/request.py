"""A request and what comes back from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from hcx.errors import ConfigError
from hcx.generate.sampling import SamplerState, SamplingParams
from hcx.generate.text import TextStream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability (nats, of the model's own distribution before temperature and penalties).

    Attributes:
        token: its id.
        logprob: None for the first token of a prompt, which has no context.
        top: the most likely ids with their log-probabilities, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        token_ids: every token of the answer, also the one that ended it.
        text: without special tokens and without the stop string; empty if the model has no tokenizer.
        finish_reason: `stop` (end token or stop string) or `length`.
        logprobs: one per token of the answer, if asked for.
        prompt_logprobs: one per token of the prompt, if asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """What one step added to one request.

    Attributes:
        text: text that became certain; often empty.
        token_ids: the new tokens.
        logprobs: theirs, if asked for.
        finish_reason: set on the last piece.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Request:
    """A prompt on its way through the scheduler.

    Attributes:
        prompt: token ids; at least one.
        params: what is asked for.
        stream: assembles the text; None without a tokenizer.
        stop_ids: tokens that end the answer.
        task: number of the task whose scales it uses (`LoadedModel.tasks`, from 1); 0: the base model.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    stream: TextStream | None = None
    stop_ids: frozenset[int] = frozenset()
    task: int = 0
    arrived: float = field(default_factory=time.monotonic)
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.sampler = SamplerState(self.params, self.prompt)

    @property
    def length(self) -> int:
        """Tokens whose keys and values the cache holds."""
        return self.computed + max(len(self.tokens) - 1, 0)

    @property
    def newest(self) -> int:
        """The token that the next step reads."""
        return self.tokens[-1]

    def completion(self) -> Completion:
        """The answer of a finished request."""
        if self.finish_reason is None:
            raise RuntimeError("the request has not finished")
        params = self.params
        return Completion(
            token_ids=tuple(self.tokens),
            text=self.stream.text if self.stream is not None else "",
            finish_reason=self.finish_reason,
            logprobs=None if params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )


def check_prompt(prompt: Sequence[int], params: SamplingParams, vocab_size: int, max_seq: int) -> None:
    """Raises ConfigError unless the prompt is non-empty, within the vocabulary, and leaves room for the answer."""
    if not prompt:
        raise ConfigError("the prompt is empty; it must hold at least one token")
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ConfigError(f"prompt token id {wrong} is outside the vocabulary; valid: 0 to {vocab_size - 1}")
    if len(prompt) + params.max_tokens > max_seq:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens and max_tokens = {params.max_tokens}; together they must not exceed "
            f"the context of {max_seq} tokens"
        )
