"""Generation from a loaded model: batches of prompts, or one prompt as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hcx.errors import ConfigError
from hcx.generate.cache import ContiguousKVCache
from hcx.generate.native_step import best_steps
from hcx.generate.request import Completion, Piece, Request
from hcx.generate.sampling import SamplingParams
from hcx.generate.scheduler import Scheduler
from hcx.generate.step import Steps
from hcx.generate.text import Detokenizer
from hcx.model.load import LoadedModel

if TYPE_CHECKING:
    from hcx.tokenizer import Tokenizer

DEFAULT_MAX_SEQ = 4096
"""What servers and conversations take when nothing is said: a long-context model's own limit would fill the memory."""
END_OF_TURN_NAMES = ("<|endofturn|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
"""Tokens that end an answer in a chat, in our own format and in well-known foreign ones."""


class Generator:
    """A loaded model with a cache and a scheduler.

    Args:
        loaded: the model.
        max_batch: requests that run at the same time; more wait.
        max_seq: prompt and answer together; the model's own limit if not given.
        prefill_tokens: see `Scheduler`.
        steps: what computes; `best_steps` if not given.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        max_batch: int = 8,
        max_seq: int | None = None,
        prefill_tokens: int = 512,
        steps: Steps | None = None,
    ) -> None:
        self.loaded = loaded
        limit = loaded.config.max_seq_len
        self.max_seq = limit if max_seq is None else max_seq
        if not 1 <= self.max_seq <= limit:
            raise ConfigError(f"max_seq = {max_seq}; must be from 1 to the model's context of {limit}")
        if max_batch < 1:
            raise ConfigError(f"max_batch = {max_batch}; must be at least 1")
        weight = loaded.decoder.output_weight()
        cache = ContiguousKVCache(loaded.config, max_batch, self.max_seq, weight.dtype, weight.device)
        steps = steps or best_steps(loaded.decoder)
        self.scheduler = Scheduler(steps, loaded.config, cache, prefill_tokens, routed=bool(loaded.tasks))
        self.detokenizer = None if loaded.tokenizer is None else Detokenizer(loaded.tokenizer)
        self.stop_ids = _end_tokens(loaded)

    def encode(self, text: str) -> list[int]:
        """See `encode_prompt`."""
        return encode_prompt(self.loaded, text)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation up to where the assistant answers."""
        return _tokenizer(self.loaded, "chat").render_chat(messages, add_generation_prompt=True)

    @property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turn, besides the end of text."""
        special = _tokenizer(self.loaded, "chat").special_tokens
        return tuple(special[name] for name in END_OF_TURN_NAMES if name in special)

    def request(self, prompt: Sequence[int], params: SamplingParams, task: int = 0) -> Request:
        """A request for the scheduler.

        Args:
            prompt: token ids.
            params: what is asked for.
            task: number of the task whose scales it uses; 0: the base model.

        Raises:
            ConfigError: stop strings without a tokenizer.
        """
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.stop_ids
        stream = None
        if self.detokenizer is not None:
            special = self.detokenizer.tokenizer.special_tokens
            # A special token named as a stop string never shows in the text: it stops by its id.
            stop_ids |= {special[text] for text in params.stop if text in special}
            stream = self.detokenizer.stream(params.stop)
        elif params.stop:
            raise ConfigError(f"stop strings need a tokenizer, and {self.loaded.directory} has no tokenizer.json")
        return Request(tuple(prompt), params, stream, frozenset(stop_ids), task)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answers to all prompts, in their order.

        Args:
            prompts: lists of token ids.
            params: one for all, or one per prompt.

        Raises:
            ConfigError: a prompt is empty or too long, or the numbers of prompts and params differ.
        """
        every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts but {len(every)} sampling parameters; give one for all or each")
        requests = [self.request(prompt, one) for prompt, one in zip(prompts, every, strict=True)]
        try:
            for request in requests:
                self.scheduler.submit(request)
            while any(request.finish_reason is None for request in requests):
                self.scheduler.step()
        finally:
            # Also after an error or an interrupt: the cache's rows must be free for the next call.
            for request in requests:
                if request.finish_reason is None:
                    self.scheduler.cancel(request)
        return [request.completion() for request in requests]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Piece]:
        """The answer as it comes; the last piece has a `finish_reason`. Closing the iterator frees the row."""
        request = self.request(prompt, params)
        self.scheduler.submit(request)
        try:
            while request.finish_reason is None:
                yield from [piece for owner, piece in self.scheduler.step() if owner is request]
        finally:
            if request.finish_reason is None:
                self.scheduler.cancel(request)


def encode_prompt(loaded: LoadedModel, text: str) -> list[int]:
    """The ids of a prompt, after the beginning-of-text token where the model's tokenizer has one.

    An empty prompt becomes the end-of-text token, which is the context that packing trains.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    tokenizer = _tokenizer(loaded, "text prompts")
    return [*tokenizer.prompt_prefix, *tokenizer.encode(text)] or [tokenizer.eos_id]


def _tokenizer(loaded: LoadedModel, needed_for: str) -> Tokenizer:
    if loaded.tokenizer is None:
        raise ConfigError(f"{needed_for}: a tokenizer is needed, and {loaded.directory} has no tokenizer.json")
    return loaded.tokenizer


def _end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those that the directory's configuration names."""
    found = set() if loaded.tokenizer is None else {loaded.tokenizer.eos_id}
    for name in ("generation_config.json", "config.json"):
        path = loaded.directory / name
        try:
            stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if stated is not None:
            found |= {token for token in (stated if isinstance(stated, list) else [stated]) if isinstance(token, int)}
    return frozenset(found)
