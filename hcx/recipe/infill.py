"""How well models write the middle of a held-out text between its two sides.

Words are cut out of held-out documents, and each model is asked for them in three ways: prefix-suffix-middle,
suffix-prefix-middle (Bavarian et al. 2022, arXiv 2207.14255, section 3), and left to right from the prefix alone. All
are scored from one forward pass each: a middle counts as an exact match where every one of its tokens is the most
likely one, which is what greedy decoding would have written. Whether it also ends there is told apart: only who has
seen both sides can know where a middle ends, and only who was trained with short ones expects it after a word; the
prefix alone knows no end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from hcx.data import ShardSet
from hcx.data.fim import infill_prompt
from hcx.data.shards import TOKENIZER_FOLDER
from hcx.data.validation import validation_documents
from hcx.dist.seeding import derived_seed
from hcx.errors import CheckpointError, ConfigError
from hcx.evals.statistics import wilson
from hcx.model.load import LoadedModel, load_model
from hcx.model.meta import ForwardMeta
from hcx.tokenizer import Tokenizer

Way = Literal["psm", "spm2", "left_to_right"]
WAYS: tuple[Way, ...] = ("psm", "spm2", "left_to_right")


@dataclass(frozen=True)
class Blank:
    """A held-out text with some of its words cut out."""

    prefix: str
    middle: str
    suffix: str


@dataclass(frozen=True)
class InfillFigures:
    """What one model made of one language's blanks, asked in one way.

    Attributes:
        label: the model's.
        language: of the texts.
        words: how many were cut out of each.
        way: how it was asked.
        count: number of blanks.
        exact: share that greedy decoding writes exactly, with its 95 % interval (Wilson).
        ended: share that it writes exactly and ends there; 0 for left to right, which has no end.
        bits_per_byte: of the middles alone.
    """

    label: str
    language: str
    words: int
    way: Way
    count: int
    exact: tuple[float, float, float]
    ended: float
    bits_per_byte: float


def blanks(
    texts: Sequence[str], words: int, count: int, seed: int, prefix_characters: int = 240, suffix_characters: int = 120
) -> list[Blank]:
    """One blank from each of the first texts that are long enough.

    Words are what white space separates, so a Korean one is a stem with its particles. A space before the first word
    goes with it, as it does in tokens of running text. The blank's place is drawn from the seed and the text itself.

    Args:
        texts: held-out documents.
        words: to cut out of each, within one line.
        count: blanks at most.
        seed: of the places.
        prefix_characters: kept before the blank at most.
        suffix_characters: kept after it at most.
    """
    found: list[Blank] = []
    for text in texts:
        if len(found) == count:
            break
        random = np.random.default_rng(derived_seed("blanks", seed, words, text))
        places = [place for place in _runs(text, words) if place[0] >= 40 and place[1] <= len(text) - 20]
        if places:
            begin, end = places[int(random.integers(len(places)))]
            begin -= text[begin - 1] == " "
            found.append(
                Blank(
                    text[max(0, begin - prefix_characters) : begin],
                    text[begin:end],
                    text[end : end + suffix_characters],
                )
            )
    return found


def _runs(text: str, words: int) -> Iterator[tuple[int, int]]:
    """Where runs of so many words on one line begin and end; every word has a letter or a digit."""
    offset = 0
    for line in text.splitlines(keepends=True):
        bounds, place = [], 0
        for word in line.split():
            place = line.index(word, place)
            bounds.append((offset + place, offset + place + len(word), any(c.isalnum() for c in word)))
            place += len(word)
        for first in range(len(bounds) - words + 1):
            run = bounds[first : first + words]
            if all(named for *_, named in run):
                yield run[0][0], run[-1][1]
        offset += len(line)


def measure_infilling(
    models: Sequence[tuple[str, str | Path]],
    shards_directory: str | Path,
    words: Sequence[int] = (1, 3),
    count: int = 300,
    seed: int = 0,
    micro_batch: int = 16,
) -> list[InfillFigures]:
    """Every model on the same blanks.

    Args:
        models: (label, MODEL directory). Each may have its own tokenizer; the blanks are text.
        shards_directory: whose held-out documents are used.
        words: how many to cut out; each number is measured by itself.
        count: blanks per language and number of words, at most.
        seed: of the blanks' places.
        micro_batch: rows per forward pass.

    Raises:
        ConfigError: no document is long enough.
        CheckpointError: a model comes without a tokenizer.
    """
    shards = ShardSet.open(shards_directory)
    reader = Tokenizer.load(shards.directory / TOKENIZER_FOLDER)
    loaded = [(label, load_model(directory)) for label, directory in models]
    figures = []
    for language in shards.languages:
        if shards.shard(language, "validation").num_documents == 0:
            continue
        texts = [_text(reader, tokens) for tokens in validation_documents(shards, language)]
        for number in words:
            cut = blanks(texts, number, count, seed)
            if not cut:
                raise ConfigError(f"{shards_directory}: no held-out {language} text is long enough for {number} words")
            for label, model in loaded:
                figures += [fill(model, label, language, number, cut, way, micro_batch) for way in WAYS]
    return figures


def _text(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    return b"".join(tokenizer.token_bytes(token) for token in tokens[:-1].tolist()).decode("utf-8")


@torch.no_grad()
def fill(
    model: LoadedModel,
    label: str,
    language: str,
    words: int,
    cut: Sequence[Blank],
    way: Way,
    micro_batch: int = 16,
) -> InfillFigures:
    """One model on blanks, asked in one way; the arguments between are for the figures' own record.

    Raises:
        CheckpointError: the model comes without a tokenizer.
    """
    if model.tokenizer is None:
        raise CheckpointError(f"{model.directory}: no tokenizer.json; blanks are text and need one")
    tokenizer = model.tokenizer
    limit = model.config.max_seq_len
    asked = [_tokens(tokenizer, blank, way, limit) for blank in cut]
    exact, ended, nats = 0, 0, 0.0
    for start in range(0, len(asked), micro_batch):
        group = asked[start : start + micro_batch]
        length = max(len(prompt) + len(answer) for prompt, answer in group)
        tokens = torch.full((len(group), length), tokenizer.eos_id)
        for row, (prompt, answer) in enumerate(group):
            tokens[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        hidden = model.decoder(tokens, ForwardMeta(positions=torch.arange(length).expand(len(group), length)))
        for row, (prompt, answer) in enumerate(group):
            places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            logprobs = model.decoder.output(hidden[places, row : row + 1]).logits()[0].float().log_softmax(-1)
            labels = torch.tensor(answer)
            # End-of-text after a rearranged middle is no byte of the middle.
            middle = len(answer) - (way != "left_to_right")
            nats -= float(logprobs[:middle].gather(-1, labels[:middle, None]).sum(dtype=torch.float64))
            right = logprobs.argmax(-1) == labels
            exact += bool(right[:middle].all())
            ended += way != "left_to_right" and bool(right.all())
    share = exact / len(cut)
    low, high = wilson(share, len(cut))
    num_bytes = sum(len(blank.middle.encode()) for blank in cut)
    return InfillFigures(
        label,
        language,
        words,
        way,
        len(cut),
        (share, low, high),
        ended / len(cut),
        nats / math.log(2) / num_bytes,
    )


def _tokens(tokenizer: Tokenizer, blank: Blank, way: Way, limit: int) -> tuple[list[int], list[int]]:
    """The prompt and the answer; the far ends of the sides go where both do not fit."""
    answer = tokenizer.encode(blank.middle)
    prefix, suffix = blank.prefix, blank.suffix
    while True:
        if way == "left_to_right":
            prompt = [tokenizer.eos_id, *tokenizer.encode(prefix)]
        else:
            prompt = [tokenizer.eos_id, *infill_prompt(tokenizer, prefix, suffix, way)]
        if len(prompt) + len(answer) < limit:
            break
        prefix, suffix = prefix[len(prefix) // 8 + 1 :], suffix[: len(suffix) - len(suffix) // 8 - 1]
    return prompt, answer if way == "left_to_right" else [*answer, tokenizer.eos_id]
