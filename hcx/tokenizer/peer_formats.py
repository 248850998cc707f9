"""Readers of tokenizer files that are not `tokenizer.json`: (number of ids, text -> ids, id -> bytes)."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hcx.errors import DataError, MissingExtra, did_you_mean
from hcx.tokenizer.alphabet import BYTE_OF, to_bytes
from hcx.tokenizer.gguf_import import byte_level_bpe

Reading = tuple[int, Callable[[str], Sequence[int]], Callable[[int], bytes]]

_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"

TIKTOKEN_PATTERNS = {
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": "|".join(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+{_CONTRACTIONS}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*{_CONTRACTIONS}?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            _REST,
        )
    ),
    "qwen": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    "qwen3_6": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}",
}
"""File stem -> how its makers cut text; a `.tiktoken` file does not say."""

_BYTE_PIECE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def _tiktoken(name: str, pattern: str, ranks: dict[bytes, int]) -> Reading:
    try:
        import tiktoken
    except ImportError:
        raise MissingExtra("tiktoken", "peers", f"the tokenizer {name}") from None
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return len(ranks), encoding.encode_ordinary, encoding.decode_single_token_bytes


def read_tiktoken(path: Path) -> Reading:
    """Lines of base64 and rank, as `tiktoken` reads them."""
    if path.stem not in TIKTOKEN_PATTERNS:
        raise DataError(f"{path}: encoding {path.stem!r}: {did_you_mean(path.stem, TIKTOKEN_PATTERNS)}")
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return _tiktoken(path.stem, TIKTOKEN_PATTERNS[path.stem], ranks)


def read_tekken(path: Path) -> Reading:
    """Mistral's JSON: ranks and pattern in one file; the last entries give way to special tokens."""
    content = json.loads(path.read_text(encoding="utf-8"))
    config = content["config"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in content["vocab"][:count]}
    _, encode, token_bytes = _tiktoken(path.stem, config["pattern"], ranks)
    return config["default_vocab_size"], encode, token_bytes


def read_sentencepiece(path: Path) -> Reading:
    """A stock SentencePiece model, with its own rules on spaces."""
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtra("sentencepiece", "korean", f"the tokenizer {path.name}") from None
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def token_bytes(number: int) -> bytes:
        piece = processor.id_to_piece(number)
        match = _BYTE_PIECE.match(piece)
        return bytes([int(match.group(1), 16)]) if match else piece.replace("\u2581", " ").encode()

    return processor.get_piece_size(), processor.encode, token_bytes


def read_gguf(path: Path) -> Reading:
    """The byte-level BPE vocabulary of a GGUF file whose pre-split pattern is known here."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtra("gguf", "gguf", f"the tokenizer of {path.name}") from None
    fields = GGUFReader(str(path)).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else None

    if value("model") != "gpt2":
        raise DataError(f"{path}: a vocabulary of the kind {value('model')!r}; only byte-level BPE ('gpt2') is read")
    return _byte_level_bpe(path, str(value("pre")), value("tokens"), value("merges"))


def _byte_level_bpe(path: Path, pre: str, tokens: list[str], merges: list[str]) -> Reading:
    backend = byte_level_bpe(tokens, merges, pre, str(path))

    def token_bytes(number: int) -> bytes:
        token = tokens[number]
        return to_bytes(token) if all(character in BYTE_OF for character in token) else token.encode()

    return len(tokens), lambda text: backend.encode(text, add_special_tokens=False).ids, token_bytes
