"""The tokenizer of a GGUF file's metadata as `tokenizer.json` and its configuration.

Byte-level BPE only (`tokenizer.ggml.model` = `gpt2`). How text is cut before merges apply is not in the file: it holds
a name, `tokenizer.ggml.pre`, and only names whose cut is known here are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hcx.errors import DataError, did_you_mean
from hcx.tokenizer.codec import Tokenizer
from hcx.tokenizer.patterns import PATTERNS

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = range(1, 5)
"""Kinds of tokens, as ggml numbers them."""

_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names under which llama.cpp cuts every digit off and then as GPT-2 does."""
_LIKE_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
"""Names that llama.cpp takes for `llama-bpe`."""
_PRE = "tokenizer.ggml.pre"


def pre_splits() -> dict[str, tuple[list[Any], bool]]:
    """`tokenizer.ggml.pre` -> the steps that cut text in that way, and whether whole pieces go before merges."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known: dict[str, tuple[list[Any], bool]] = {
        pattern.llama_cpp: ([pre_tokenizers.Split(Regex(pattern.regex), "isolated"), byte_level], pattern.ignore_merges)
        for pattern in PATTERNS.values()
    }
    known |= dict.fromkeys(_LIKE_LLAMA3, known["llama-bpe"])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known["gpt-2"] = ([gpt2], False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    known |= dict.fromkeys(_DIGITS_THEN_GPT2, ([digits, gpt2], False))
    return known


def byte_level_bpe(tokens: list[str], merges: list[str], pre: str, source: str) -> Any:
    """The codec of a GGUF vocabulary, without special tokens.

    Raises:
        DataError: an unknown cut, a token twice, or a merge that does not fit the vocabulary.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    known = pre_splits()
    if pre not in known:
        raise DataError(f"{source}: {_PRE} = {pre!r}: {did_you_mean(pre, known)}")
    steps, ignore_merges = known[pre]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise DataError(f"{source}: tokenizer.ggml.tokens holds {twice!r} twice")
    pairs = []
    for merge in merges:
        # A piece is never empty, so a blank at the very start belongs to it.
        head, _, right = merge[1:].partition(" ")
        left = merge[:1] + head
        if not all(piece in vocabulary for piece in (left, right, left + right)):
            raise DataError(f"{source}: tokenizer.ggml.merges holds {merge!r}, which is no pair of its tokens")
        pairs.append((left, right))
    backend = Backend(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def tokenizer_of_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that a GGUF file states.

    Args:
        metadata: key -> value, arrays of strings as lists.
        source: names the file in errors.

    Raises:
        DataError: a kind that is not read here, or statements that do not fit together.
    """
    from tokenizers import AddedToken, processors

    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise DataError(
            f"{source}: a tokenizer of the kind {model!r}; only byte-level BPE ('gpt2') is read from GGUF: convert the "
            "model from its original directory instead"
        )
    tokens, merges = _strings(metadata, "tokens", source), _strings(metadata, "merges", source)
    pre = str(metadata.get(_PRE, "gpt-2"))
    backend = byte_level_bpe(tokens, merges, pre, source)
    kinds = _kinds(metadata, len(tokens), source)
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    named = {
        role: _named(metadata, key, tokens, source)
        for role, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
    }
    # llama.cpp puts a beginning-of-text token before text of this kind unless the file says otherwise.
    usual = pre == "llama-bpe" or pre in _LIKE_LLAMA3
    before = [named["bos_token"]] if metadata.get("tokenizer.ggml.add_bos_token", usual) else []
    after = [named["eos_token"]] if metadata.get("tokenizer.ggml.add_eos_token") else []
    around = [token for token in (*before, *after) if token is not None]
    if len(around) != len(before) + len(after):
        raise DataError(
            f"{source}: it wants a token around every text, and does not say which (bos_token_id, eos_token_id)"
        )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if around:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(around)],
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{role: token for role, token in named.items() if token is not None},
    }
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(length, int):
        config["model_max_length"] = length
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return Tokenizer(backend.to_str(), config, source)


def _strings(metadata: Mapping[str, Any], name: str, source: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: tokenizer.ggml.{name} is missing or no list of strings")
    return value


def _kinds(metadata: Mapping[str, Any], count: int, source: str) -> list[int]:
    value = metadata.get("tokenizer.ggml.token_type")
    if value is None:
        return [_NORMAL] * count
    kinds = value.tolist() if hasattr(value, "tolist") else []
    if len(kinds) != count:
        raise DataError(f"{source}: {len(kinds)} entries in tokenizer.ggml.token_type, {count} tokens")
    return kinds


def _named(metadata: Mapping[str, Any], key: str, tokens: list[str], source: str) -> str | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(tokens):
        raise DataError(f"{source}: tokenizer.ggml.{key} = {value!r}; one of {len(tokens)} tokens is needed")
    return tokens[value]
