"""Writes a tokenizer as a GGUF file that holds a vocabulary and no weights, as llama.cpp's `vocab_only` reads it."""

from __future__ import annotations

import json
from pathlib import Path

from hcx.errors import DataError, MissingExtra
from hcx.tokenizer.codec import Tokenizer
from hcx.tokenizer.patterns import PATTERNS


def llama_cpp_name(tokenizer: Tokenizer) -> str:
    """The name (`tokenizer.ggml.pre`) under which llama.cpp cuts text as this tokenizer does.

    Raises:
        DataError: it does not, so that ids would differ there.
    """
    parsed = json.loads(tokenizer.tokenizer_json)
    steps = (parsed.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    regex = steps[0].get("pattern", {}).get("Regex")
    ignore_merges = bool(parsed["model"].get("ignore_merges", False))
    for pattern in PATTERNS.values():
        if parsed["model"].get("type") == "BPE" and (pattern.regex, pattern.ignore_merges) == (regex, ignore_merges):
            return pattern.llama_cpp
    raise DataError(
        "not a tokenizer of hcx: llama.cpp may cut its text differently; convert it with the tools of its makers"
    )


def write_gguf_vocab(tokenizer: Tokenizer, path: str | Path, architecture: str = "llama") -> None:
    """Writes the vocabulary, merges, special tokens and chat template.

    Special tokens have the type CONTROL, so that llama.cpp, too, takes them from text only when told to.

    Args:
        tokenizer: one of ours.
        path: the file to write.
        architecture: the name that llama.cpp wants of any file.

    Raises:
        MissingExtra: the package gguf is not installed.
        DataError: llama.cpp would cut text differently.
    """
    try:
        from gguf import GGUFWriter, TokenType
    except ImportError:
        raise MissingExtra("gguf", "gguf", "writing a GGUF vocabulary") from None
    pre = llama_cpp_name(tokenizer)
    parsed = json.loads(tokenizer.tokenizer_json)
    tokens = [""] * tokenizer.vocab_size
    for token, number in parsed["model"]["vocab"].items():
        tokens[number] = token
    types = [TokenType.NORMAL] * len(tokens)
    for token, number in tokenizer.special_tokens.items():
        tokens[number] = token
        types[number] = TokenType.CONTROL
    writer = GGUFWriter(str(path), architecture)
    writer.add_name("hcx tokenizer")
    # A file without these is refused before its vocabulary is looked at; with vocab_only nothing else reads them.
    writer.add_context_length(128)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(128)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in parsed["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    # The name `llama-bpe` would otherwise switch a beginning-of-text token on.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
