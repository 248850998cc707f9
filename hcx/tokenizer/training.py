"""Learns byte-level BPE tokenizers (Sennrich et al. 2016, over bytes as in GPT-2)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from hcx.errors import ConfigError, did_you_mean
from hcx.obs import get_logger
from hcx.tokenizer.alphabet import BYTE_OF
from hcx.tokenizer.morphemes import Analyser, KiwiAnalyser
from hcx.tokenizer.patterns import PATTERNS, Pattern
from hcx.tokenizer.pieces import count_pieces, soften
from hcx.tokenizer.recipe import MorphemeBpe, PlainBpe
from hcx.tokenizer.sentencepiece_bpe import SENTENCEPIECE_FILE, learn, merges_of
from hcx.tokenizer.special import CHAT_TEMPLATE, END_OF_TEXT, SPECIAL_TOKENS, VOCAB_MULTIPLE, spare

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import Model

    from hcx.tokenizer.codec import Tokenizer

_logger = get_logger(__name__)

MIN_VOCAB = -(-(len(SPECIAL_TOKENS) + len(BYTE_OF)) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
"""All special tokens and all bytes must fit."""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    pattern: str = "llama3",
    algorithm: PlainBpe | MorphemeBpe | None = None,
    analyser: Analyser | None = None,
) -> Tokenizer:
    """Learns merges from texts.

    Ids: special tokens, then the 256 bytes, then merges. When the texts yield too few merges, more spare tokens fill
    the vocabulary up to exactly `vocab_size`. The same texts give the same tokenizer, on any number of threads.

    Args:
        texts: what to learn from; read once.
        vocab_size: number of ids including special tokens, a multiple of 128.
        pattern: a name in `PATTERNS`.
        algorithm: how merges are learnt; None: plain BPE.
        analyser: finds the morphemes; None: Kiwi, where the algorithm wants morphemes.

    Raises:
        ConfigError: the size or the pattern is not possible.
        MissingExtra: the algorithm needs a package that is not installed.
    """
    if vocab_size % VOCAB_MULTIPLE or vocab_size < MIN_VOCAB:
        raise ConfigError(
            f"vocab_size = {vocab_size}: must be a multiple of {VOCAB_MULTIPLE}, at least {MIN_VOCAB} "
            f"({len(SPECIAL_TOKENS)} special tokens and 256 bytes)"
        )
    if pattern not in PATTERNS:
        raise ConfigError(f"pattern = {pattern!r}: {did_you_mean(pattern, PATTERNS)}")
    if isinstance(algorithm, MorphemeBpe):
        return _train_morphemes(texts, vocab_size, PATTERNS[pattern], algorithm, analyser)
    return _train_plain(texts, vocab_size, PATTERNS[pattern])


def learning_packages(algorithm: PlainBpe | MorphemeBpe) -> dict[str, str]:
    """Package -> version of what decides the merges, for the ledger: another version may learn others."""
    names = ["tokenizers"]
    if isinstance(algorithm, MorphemeBpe):
        names = ["sentencepiece"] if algorithm.granularity == "none" else ["sentencepiece", "kiwipiepy"]
    return {name: version(name) for name in names}


def _train_plain(texts: Iterable[str], vocab_size: int, pattern: Pattern) -> Tokenizer:
    from tokenizers import AddedToken, models, trainers

    backend = _backend(models.BPE(ignore_merges=pattern.ignore_merges), pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _finish(backend, vocab_size)


def _train_morphemes(
    texts: Iterable[str], vocab_size: int, pattern: Pattern, algorithm: MorphemeBpe, analyser: Analyser | None
) -> Tokenizer:
    from tokenizers import AddedToken, Regex, models, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern.regex), "isolated")
    if algorithm.granularity == "none":
        counts = count_pieces(texts, split)
    else:
        counts = count_pieces(texts, split, analyser or KiwiAnalyser(), algorithm.granularity)
        counts = soften(counts, algorithm.crossing)
    num_merges = vocab_size - len(SPECIAL_TOKENS) - len(BYTE_OF)
    model, tokens = learn(counts, num_merges, algorithm.max_piece_bytes, algorithm.space_runs)
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *sorted(BYTE_OF), *tokens))}
    backend = _backend(
        models.BPE(vocab=vocabulary, merges=merges_of(tokens), ignore_merges=pattern.ignore_merges), pattern
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return _finish(backend, vocab_size, {SENTENCEPIECE_FILE: model})


def _backend(model: Model, pattern: Pattern) -> Backend:
    from tokenizers import Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern.regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _finish(backend: Backend, vocab_size: int, companions: Mapping[str, bytes] | None = None) -> Tokenizer:
    from tokenizers import AddedToken

    from hcx.tokenizer.codec import Tokenizer

    missing = vocab_size - backend.get_vocab_size()
    if missing:
        _logger.warning(
            "the text teaches %d merges less than vocab_size = %d has room for; as many more tokens are spare",
            missing,
            vocab_size,
        )
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
        companions=companions,
    )
