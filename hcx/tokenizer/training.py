"""Trains a byte-level BPE tokenizer (Sennrich et al. 2016, over bytes as in GPT-2) with the `tokenizers` library."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hcx.errors import ConfigError
from hcx.tokenizer.special import CHAT_TEMPLATE, END_OF_TEXT, SPECIAL_TOKENS, VOCAB_MULTIPLE, spare

if TYPE_CHECKING:
    from hcx.tokenizer.codec import Tokenizer

LLAMA3_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""The pre-split pattern of Llama 3, one of those that llama.cpp knows by name."""

PATTERNS = {"llama3": LLAMA3_PATTERN}

MIN_VOCAB = -(-(len(SPECIAL_TOKENS) + 256) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
"""All special tokens and all bytes must fit."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, pattern: str = "llama3") -> Tokenizer:
    """Learns merges from texts.

    Ids: special tokens, then the 256 bytes, then merges. When the texts yield too few merges, more spare tokens fill
    the vocabulary up to exactly `vocab_size`.

    Args:
        texts: what to learn from; read once.
        vocab_size: number of ids including special tokens, a multiple of 128.
        pattern: a name in `PATTERNS`.

    Raises:
        ConfigError: the size or the pattern is not possible.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    from hcx.tokenizer.codec import Tokenizer

    if vocab_size % VOCAB_MULTIPLE or vocab_size < MIN_VOCAB:
        raise ConfigError(
            f"vocab_size = {vocab_size}: must be a multiple of {VOCAB_MULTIPLE}, at least {MIN_VOCAB} "
            f"({len(SPECIAL_TOKENS)} special tokens and 256 bytes)"
        )
    if pattern not in PATTERNS:
        raise ConfigError(f"pattern = {pattern!r}: valid: {', '.join(sorted(PATTERNS))}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    missing = vocab_size - backend.get_vocab_size()
    numbers = itertools.islice(itertools.count(len(SPECIAL_TOKENS)), missing)
    backend.add_special_tokens([AddedToken(spare(number), special=True, normalized=False) for number in numbers])
    return Tokenizer(
        json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=1) + "\n",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
            "chat_template": CHAT_TEMPLATE,
        },
    )
