"""How the next token is chosen: greedy, or temperature, top-k and top-p with a seed per request."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcx.errors import ConfigError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks for.

    Attributes:
        max_tokens: at most this many new tokens; 0 only scores the prompt.
        temperature: 0 is greedy.
        top_k: choose among the k most likely; 0 for all.
        top_p: choose among the most likely that together hold this probability.
        repetition_penalty: logits of tokens seen in prompt or answer are divided by it if positive, multiplied if
            negative (Keskar et al. 2019, section 4.1).
        presence_penalty, frequency_penalty: taken from the logit of a token that the answer holds, once and per
            occurrence.
        seed: makes a request repeatable, whatever else runs beside it; None for a fresh one.
        stop: strings that end the answer; they are not part of its text.
        stop_token_ids: tokens that end the answer, besides the model's own.
        ignore_eos: the model's own end tokens do not end the answer.
        logprobs: log-probabilities of the new tokens with this many alternatives each; None for none.
        prompt_logprobs: the same for the prompt's tokens.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _between("max_tokens", self.max_tokens, 0)
        _between("temperature", self.temperature, 0, 100)
        _between("top_k", self.top_k, 0)
        _between("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise ConfigError("top_p = 0; must be above 0; for the most likely token alone use temperature 0")
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _between("presence_penalty", self.presence_penalty, -100, 100)
        _between("frequency_penalty", self.frequency_penalty, -100, 100)
        if self.seed is not None:
            _between("seed", self.seed, -MAX_SEED, MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _between(name, getattr(self, name), 0)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop = {self.stop!r}; must be a sequence of non-empty strings")

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _between(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:  # NaN fails too
        limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(f"{name} = {value}; must be {limits}")


class SamplerState:
    """One request's randomness and the tokens that penalties need."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.params = params
        self.prompt = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()
        self.counts: Counter[int] = Counter()
        self._generator: torch.Generator | None = None

    def uniform(self) -> float:
        """The request's next random number in [0, 1)."""
        if self._generator is None:
            seed = self.params.seed if self.params.seed is not None else secrets.randbits(63)
            self._generator = torch.Generator().manual_seed(seed)
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def record(self, token: int) -> None:
        """Notes a token of the answer."""
        if self.params.penalised:
            self.counts[token] += 1


def sample(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Chooses a token per row.

    Each row uses its own request's random numbers, so the choice does not depend on what is beside it in the batch.

    Args:
        logits: `[batch, vocab]` fp32; not changed.
        states: one per row.

    Returns:
        `[batch]` int64.
    """
    if any(state.params.penalised for state in states):
        logits = torch.stack([_penalise(row, state) for row, state in zip(logits, states, strict=True)])
    chosen = logits.argmax(-1)
    random = [index for index, state in enumerate(states) if state.params.temperature > 0]
    if random:
        rows = torch.tensor(random, device=logits.device)
        chosen[rows] = _draw(logits[rows], [states[index] for index in random])
    return chosen


def _penalise(logits: Tensor, state: SamplerState) -> Tensor:
    params = state.params
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(state.prompt | state.counts.keys()), dtype=torch.int64, device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if state.counts and (params.presence_penalty or params.frequency_penalty):
        tokens = torch.tensor(list(state.counts), dtype=torch.int64, device=logits.device)
        counts = torch.tensor(list(state.counts.values()), dtype=logits.dtype, device=logits.device)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def _draw(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    ordered, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    # The maximum goes first, so that a very small temperature gives exp(0) and exp(-inf), never a NaN.
    scaled = (ordered - ordered[:, :1]) / column([state.params.temperature for state in states])
    rank = torch.arange(scaled.shape[1], device=logits.device)
    limits = column([float(state.params.top_k or scaled.shape[1]) for state in states])
    weights = torch.where(rank < limits, scaled.exp(), 0.0)
    probabilities = weights / weights.sum(-1, keepdim=True)
    # A token stays while those before it hold less than top_p: the first always stays.
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < column([state.params.top_p for state in states]), probabilities, 0.0)
    cumulative = kept.cumsum(-1)
    threshold = column([state.uniform() for state in states]) * cumulative[:, -1:]
    # The first place whose cumulative weight exceeds the threshold; never one of weight zero.
    place = (cumulative <= threshold).sum(-1, keepdim=True)
    return tokens.gather(-1, place.clamp_max((kept > 0).sum(-1, keepdim=True) - 1)).squeeze(-1)
