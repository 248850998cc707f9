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
LOWEST_TEMPERATURE = 1e-6
"""Below it only the most likely token has any weight in fp32."""
CANDIDATES = 512
"""Tokens looked at before a whole vocabulary is sorted for top-k and top-p."""


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
    # The maximum goes first, and the temperature stays a normal number: then the smallest gives exp(0) and exp(-inf),
    # never a NaN.
    shifted = logits - logits.amax(-1, keepdim=True)
    temperatures = [max(state.params.temperature, LOWEST_TEMPERATURE) for state in states]
    probabilities = (shifted / _column(temperatures, logits)).softmax(-1)
    uniform = _column([state.uniform() for state in states], logits, torch.float64)
    chosen = torch.empty(len(states), dtype=torch.int64, device=logits.device)
    limited = [index for index, state in enumerate(states) if state.params.top_k or state.params.top_p < 1]
    free = [index for index in range(len(states)) if index not in limited]
    if free:
        chosen[free] = _invert(probabilities[free], uniform[free])
    # Sorting a whole vocabulary is slow, and the likely tokens nearly always suffice.
    for candidates in (CANDIDATES, logits.shape[-1]):
        if limited:
            params = [states[index].params for index in limited]
            tokens, enough = _draw_limited(probabilities[limited], uniform[limited], params, candidates)
            chosen[limited] = tokens
            limited = [index for index, done in zip(limited, enough.tolist(), strict=True) if not done]
    return chosen


def _draw_limited(
    probabilities: Tensor, uniform: Tensor, params: Sequence[SamplingParams], candidates: int
) -> tuple[Tensor, Tensor]:
    """Draws among the top-k and top-p tokens, if they are among the `candidates` most likely.

    Returns:
        A token per row, and whether the candidates held everything that the row may choose from.
    """
    vocab = probabilities.shape[-1]
    candidates = min(candidates, vocab)
    values, tokens = probabilities.topk(candidates, dim=-1)
    values = values.double()
    rank = torch.arange(candidates, device=values.device)
    limits = _column([min(one.top_k or vocab, vocab) for one in params], values, torch.int64)
    values = torch.where(rank < limits, values, 0.0)
    # Top-p counts within what top-k left; without top-k the whole distribution has mass 1.
    mass = torch.where(limits < vocab, values.sum(-1, keepdim=True), 1.0)
    # A token stays while those before it hold less than top_p: the first always stays.
    kept = (values.cumsum(-1) - values) < _column([one.top_p for one in params], values) * mass
    enough = (limits <= candidates).squeeze(-1) | ~kept[:, -1] | (candidates == vocab)
    place = _invert(torch.where(kept, values, 0.0), uniform)
    return tokens.gather(-1, place[:, None]).squeeze(-1), enough


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The place at which the cumulative weight passes a share of the total: `[n, places]`, `[n, 1]` -> `[n]`."""
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total even after rounding: a place of weight zero is never chosen.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= threshold).sum(-1)


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]
