"""Fill in the middle: documents rearranged so that a left-to-right model learns to write between two texts.

Bavarian et al. 2022 (arXiv 2207.14255): a document is cut in three at two places, and its parts are put in another
order with a sentinel before each (section 3).

    PSM            <PRE> prefix <SUF> suffix <MID> middle <EOT>
    SPM variant 2  <PRE> <SUF> suffix <MID> prefix middle <EOT>     (PSM with an empty prefix; the default)
    SPM variant 1  <SUF> suffix <PRE> prefix <MID> middle <EOT>

Cuts fall between characters (code points), so tokens come apart where they must and no byte sequence does. The parts
are encoded one by one, as a prompt is (`infill_prompt`). Everything is a pure function of a random generator that the
caller derives from the seed and the sample, so the number of threads or ranks changes no byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from hcx.config import Config
from hcx.errors import ConfigError, did_you_mean
from hcx.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer

_ADDED = 4
"""Tokens that rearranging adds at most: three sentinels, and end-of-text where the piece had none."""

Order = Literal["psm", "spm1", "spm2"]


class FimConfig(Config):
    """How much of the training text is rearranged, and how."""

    rate: float = Field(default=0.5, ge=0, le=1)
    """Share of documents (of pieces of documents within a row, at context level) that are rearranged."""
    rates: dict[str, float] = Field(default_factory=dict)
    """By language, instead of `rate`."""
    psm_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the rearranged ones in prefix-suffix-middle order; the others are suffix-prefix-middle."""
    spm_variant: Literal[1, 2] = 2
    """The order of suffix-prefix-middle: 2 is prefix-suffix-middle with an empty prefix, and transfers best."""
    split: Literal["random", "thirds"] = "random"
    """Where a document is cut: at two uniformly random places, or into thirds (as a footnote of the HyperCLOVA X
    report describes it)."""
    longest_middle: int | None = Field(default=None, ge=1)
    """Characters of a middle at most, with `split: random`; None: up to the whole text. A middle that is a third of
    its text on average is mostly continued from itself; of a short one, nearly every token leans on the sides, and
    where it ends is seen as often as where it begins."""
    level: Literal["context", "document"] = "context"
    """Whether documents are rearranged within the rows that hold them, so that every middle stands in one row with
    its suffix, or whole, before they are cut into rows."""

    @model_validator(mode="after")
    def _middles_fit_the_split(self) -> FimConfig:
        if self.longest_middle is not None and self.split == "thirds":
            raise ValueError(
                f"longest_middle = {self.longest_middle} with split: thirds; thirds have their own length, so leave "
                f"one of the two out"
            )
        return self

    def rate_of(self, language: str) -> float:
        """The rate that holds for a language."""
        return self.rates.get(language, self.rate)

    def check_languages(self, languages: Sequence[str]) -> None:
        """Refuses rates outside [0, 1] and of languages that there are not.

        Raises:
            ConfigError: naming the key.
        """
        for language, rate in self.rates.items():
            if language not in languages:
                raise ConfigError(f"fim.rates.{language}: no such language; {did_you_mean(language, languages)}")
            if not 0 <= rate <= 1:
                raise ConfigError(f"fim.rates.{language} = {rate}: must be 0 to 1")


@dataclass(frozen=True)
class Draw:
    """What is decided about one piece; the same number of random values is drawn whatever they decide.

    Attributes:
        chosen: whether the piece is rearranged.
        psm: in which order.
        cuts: two uniform numbers in [0, 1), from which the cut points follow once the length is known.
    """

    chosen: bool
    psm: bool
    cuts: tuple[float, float]


def draw(random: np.random.Generator, rate: float, psm_share: float) -> Draw:
    """Decides about one piece."""
    chosen, psm, first, second = random.random(4)
    return Draw(bool(chosen < rate), bool(psm < psm_share), (float(first), float(second)))


def cut_points(
    length: int, cuts: tuple[float, float], split: Literal["random", "thirds"], longest_middle: int | None = None
) -> tuple[int, int]:
    """Where the middle of `length` characters begins and ends, `0 <= begin <= end <= length`.

    With a longest middle, the middle's size is uniform from 1 to that, and then its place is.
    """
    if split == "thirds":
        return length // 3, 2 * length // 3
    if longest_middle is not None and length > 0:
        size = 1 + int(cuts[0] * min(longest_middle, length))
        begin = int(cuts[1] * (length - size + 1))
        return begin, begin + size
    first, second = (int(cut * (length + 1)) for cut in cuts)
    return min(first, second), max(first, second)


class Fim:
    """Rearranges the tokens of documents.

    Args:
        config: how.
        tokenizer: of the tokens; it must have the three sentinels.

    Raises:
        ConfigError: the tokenizer lacks a sentinel.
    """

    def __init__(self, config: FimConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._prefix, self._suffix, self._middle = sentinels(tokenizer)

    def rearranged(self, text: str, choice: Draw) -> list[int]:
        """A text in its new order, without end-of-text."""
        begin, end = cut_points(len(text), choice.cuts, self.config.split, self.config.longest_middle)
        parts = self._tokenizer.encode_batch([text[:begin], text[begin:end], text[end:]])
        prefix, middle, suffix = parts
        if choice.psm:
            return [self._prefix, *prefix, self._suffix, *suffix, self._middle, *middle]
        if self.config.spm_variant == 2:
            return [self._prefix, self._suffix, *suffix, self._middle, *prefix, *middle]
        return [self._suffix, *suffix, self._prefix, *prefix, self._middle, *middle]

    def document(self, tokens: NDArray[np.int64], choice: Draw) -> NDArray[np.int64]:
        """One whole document (its last token is end-of-text), rearranged or as it was."""
        if not choice.chosen:
            return tokens
        ids = self.rearranged(self._text(tokens[:-1]), choice)
        return np.asarray([*ids, self._tokenizer.eos_id], dtype=np.int64)

    def row(
        self, tokens: NDArray[np.int64], rate: float, random: np.random.Generator
    ) -> tuple[NDArray[np.int64], bool]:
        """The pieces of documents in a row, each rearranged or as it was, in a row of no more tokens.

        A rearranged piece is always whole: it ends with its middle and end-of-text, even where the row cut the
        document. What the sentinels need is taken from the end of the last piece's text, before it is rearranged:
        trimming the finished row instead would cut off exactly the middle that is to be learned.

        Args:
            tokens: `[n]`, pieces that end with end-of-text, but perhaps the last.
            rate: share of pieces to rearrange.
            random: derived from the seed and the sample.

        Returns:
            `[m]` tokens, `m <= n`, and whether the first piece was rearranged. `m < n` where the last piece's parts
            were encoded in fewer tokens than the whole.
        """
        size = len(tokens)
        ends = np.flatnonzero(tokens == self._tokenizer.eos_id) + 1
        bounds = [0, *ends.tolist()]
        if bounds[-1] != size:
            bounds.append(size)
        out: list[NDArray[np.int64]] = []
        used, first = 0, False
        for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
            choice = draw(random, rate, self.config.psm_share)
            piece = tokens[begin:end]
            fitted = self._fitted(piece, size - used, choice) if choice.chosen else None
            first |= number == 0 and fitted is not None
            piece = piece[: size - used] if fitted is None else fitted
            out.append(piece)
            used += len(piece)
            if used == size:
                break
        return np.concatenate(out), first

    def _fitted(self, piece: NDArray[np.int64], budget: int, choice: Draw) -> NDArray[np.int64] | None:
        """A piece rearranged within a number of tokens; None where not even one token of text has room."""
        eos = self._tokenizer.eos_id
        content = piece[:-1] if piece[-1] == eos else piece
        keep = min(len(content), budget - _ADDED)
        while keep > 0:
            ids = self.rearranged(self._text(content[:keep]), choice)
            if len(ids) < budget:
                return np.asarray([*ids, eos], dtype=np.int64)
            # The parts took more tokens than the whole; the excess is a few tokens at the cuts.
            keep -= len(ids) + 1 - budget
        return None

    def _text(self, tokens: NDArray[np.int64]) -> str:
        # A row may begin or end inside a character; what is left of it there is no text.
        data = b"".join(self._tokenizer.token_bytes(token) for token in tokens.tolist())
        return data.decode("utf-8", errors="ignore")


def sentinels(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids of the prefix, suffix and middle sentinels.

    Raises:
        ConfigError: the tokenizer lacks one.
    """
    special: Mapping[str, int] = tokenizer.special_tokens
    missing = [name for name in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE) if name not in special]
    if missing:
        raise ConfigError(
            f"fim: the tokenizer has no {' or '.join(missing)}; train one with hcx tokenizer train, or leave fim out"
        )
    return special[FIM_PREFIX], special[FIM_SUFFIX], special[FIM_MIDDLE]


def infill_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, order: Order = "psm") -> list[int]:
    """What a model is given to write the text between `prefix` and `suffix`; it ends with end-of-text.

    Args:
        tokenizer: the model's.
        prefix: what comes before.
        suffix: what comes after.
        order: `psm` ends at the middle sentinel; `spm2` puts the prefix after it; `spm1` as in training with
            `spm_variant: 1`.
    """
    before, after, middle = sentinels(tokenizer)
    head, tail = tokenizer.encode(prefix), tokenizer.encode(suffix)
    if order == "psm":
        return [before, *head, after, *tail, middle]
    if order == "spm2":
        return [before, after, *tail, middle, *head]
    return [after, *tail, before, *head, middle]
