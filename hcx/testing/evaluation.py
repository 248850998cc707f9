"""Tiny model directories with a real small tokenizer, and requests that try every branch of an evaluation adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hcx.model.convert.hf import export_hf
from hcx.testing.tiny import TINY_TEXT, decoder_tensors, tiny_config, tiny_decoder

EOS = "<|endoftext|>"
BOS = "<|begin|>"


def write_tokenizer(directory: Path, vocab_size: int, adds_bos: bool) -> None:
    """A byte-level BPE as `transformers` reads it; with `adds_bos`, one that starts every text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [EOS, BOS] if adds_bos else [EOS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_TEXT, trainer)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS}
    if adds_bos:
        config["bos_token"] = BOS
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def evaluable_directory(directory: Path, architecture: str = "llama", adds_bos: bool = False, **overrides: Any) -> Path:
    """A random model directory that an evaluation can load."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(architecture, **overrides)
    export_hf(directory, config, decoder_tensors(tiny_decoder(config)).items())
    write_tokenizer(directory, config.vocab_size, adds_bos)
    return directory


CHOICES = [" A", " B", " 서울", " 부산이다. 한강이 흐르는"]

PAIRS: list[tuple[str, str]] = [
    *[("질문: 대한민국의 수도는 어디인가?\n정답:", choice) for choice in CHOICES],
    ("The capital of Korea is", " Seoul. A river flows through the city"),
    ("def add(left, right):\n", "    return left + right\n"),
    ("Trailing space moves to the continuation ", "of this pair"),
    ("", "문서를 열려면 파일 메뉴에서"),
    ("", EOS + "a text that starts with the end of text"),
    ("x", "y"),
    ("대한민국의 수도는 서울이다. " * 60, "문서를 열려면"),
    ("To open a document, choose Open from the File menu. " * 40, " " + "To save it, choose Save. " * 3),
]
"""Context and continuation: one-token and many-token continuations, shared contexts, empty and over-long ones."""

TEXTS = [
    "짧다.",
    "The capital of Korea is Seoul.",
    "서울에는 한강이 흐르고, 많은 사람이 산다. A river flows through the city.\n" * 30,
]
"""Whole texts; the last needs several windows."""

PROMPTS = [
    "문서를 열려면",
    "The capital of Korea is Seoul. A river",
    "def add(left, right):\n    return",
    "대한민국의 수도는 서울이다. " * 40,
]
"""What to continue; the last is too long for the model."""
