"""Text that tokenizers get wrong, and small morpheme-aware tokenizers that several tests share."""

from __future__ import annotations

import random
import unicodedata
from functools import cache
from pathlib import Path

from hcx.data.recipe import EmbeddedSource, StdlibSource
from hcx.data.sources import read_source
from hcx.tokenizer import Tokenizer, train_tokenizer
from hcx.tokenizer.morphemes import KiwiAnalyser
from hcx.tokenizer.recipe import MorphemeBpe

TRAINING_BYTES = 300_000
"""Of each language: learnt in seconds, and enough for whole Korean words to become tokens."""

VOCAB_SIZE = 4096

AWKWARD = (
    "\u1112\u1161\u11ab\u1100\u1173\u11af",  # conjoining jamo, which NFC would compose
    "\u3131\u314f \u3147\u3147 \u314b\u314b\u314b",  # compatibility jamo
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1f0\U0001f1f7 \U0001f44d\U0001f3fd",
    "\u30ab\u30bf\u30ab\u30ca \u3072\u3089\u304c\u306a \u6f22\u5b57 \ud55c\u56fd\u8a9e",
    "tabs\t\tand\r\nCRLF \r lone\x0b\x0c\x85\u2028\u2029end",
    "\u00a0nbsp\u3000ideographic space\u200bzero width\ufeffbom",
    "   leading, trailing   \n\n   \n",
    "\u2581SentencePiece's own space\ue000 and the boundary mark \u0120\u010a of the byte alphabet",
    "don't DON'T you'LL '\u017f I'\u212a \u0130\u0131",  # case folding reaches further than llama.cpp's list
    "1234567 \u0661\u0662\u0663\u0664 \u2160\u2163 \u00bd 3.14e-10 0xFF_FF",
    "e\u0301 cafe\u0301 a\u0300\u0301\u0302 \u0e01\u0e33 \u0928\u093f",
    "\x00\x01\x7f\x80\x9f control",
    "def f(x):\n\tif x:\n\t\treturn {**x, 'a': [1, 2]}  # comment\n        return None\n",
    "https://example.org/a?b=c&d=%ED%95%9C#e \ud55c\uae00.\ud55c\uad6d/\uacbd\ub85c",
)
"""Each trips some tokenizer: NFD and isolated jamo, emoji sequences, other scripts, line ends, reserved characters."""


@cache
def texts_of(language: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(learnt from, held out): `TRAINING_BYTES` of `ko`, `en` or `code`, and other files of the same kind."""
    source = (
        StdlibSource(max_bytes=None) if language == "code" else EmbeddedSource.model_validate({"language": language})
    )
    learnt: list[str] = []
    held_out: list[str] = []
    room = TRAINING_BYTES
    for document in read_source(source, Path()):
        size = len(document.text.encode())
        if document.split != "validation" and size <= room:
            learnt.append(document.text)
            room -= size
        elif document.split == "validation" or language == "code":
            held_out.append(document.text)
    return tuple(learnt), tuple(held_out)


@cache
def tokenizer_of(
    granularity: str, languages: tuple[str, ...] = ("ko", "en", "code"), pattern: str = "llama3"
) -> Tokenizer:
    """A tokenizer of `VOCAB_SIZE` ids, learnt from `TRAINING_BYTES` of each language."""
    texts = [text for language in languages for text in texts_of(language)[0]]
    algorithm = MorphemeBpe.model_validate({"granularity": granularity, "space_runs": 16})
    return train_tokenizer(texts, VOCAB_SIZE, pattern, algorithm, None if granularity == "none" else analyser())


@cache
def analyser() -> KiwiAnalyser:
    """Kiwi, which takes a second to start."""
    return KiwiAnalyser()


@cache
def mixed_lines(count: int = 10_000, seed: int = 0) -> tuple[str, ...]:
    """Lines of held-out Korean, English and code, Korean decomposed (NFD), random characters, and `AWKWARD`, mixed."""
    generator = random.Random(seed)
    kinds = [
        [line for text in texts_of(name)[1] for line in text.splitlines() if line] for name in ("ko", "en", "code")
    ]
    kinds.append([unicodedata.normalize("NFD", line) for line in kinds[0]])
    lines: list[str] = []
    while len(lines) < count:
        choice = generator.randrange(len(kinds) + 2)
        if choice < len(kinds):
            lines.append(generator.choice(kinds[choice]))
        elif choice == len(kinds):
            lines.append("".join(generator.sample(AWKWARD, 2)))
        else:
            lines.append("".join(map(_character, [generator] * generator.randrange(1, 60))))
    return tuple(lines)


def _character(generator: random.Random) -> str:
    """Any code point of text, near ones often: most of the range is unassigned."""
    limit = generator.choice((0x80, 0x250, 0x3200, 0xD800, 0x20000, 0x110000))
    code = generator.randrange(limit)
    return chr(code) if not 0xD800 <= code < 0xE000 else " "
