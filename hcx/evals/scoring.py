"""Prompts, targets and per-item scores of hcx's tasks (`!function` in the task files)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LETTERS = "ABCDEFGH"


def text(doc: dict[str, Any]) -> str:
    """A document to be scored whole."""
    return str(doc["text"])


def document_bits(doc: dict[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood (nats, end of document included) and UTF-8 bytes of a document."""
    (logprob,) = results
    return {"bits_per_byte": (float(logprob), int(doc["bytes"]))}


def bits_per_byte(items: Sequence[tuple[float, int]]) -> float:
    """Bits per byte of a set of documents: all bits over all bytes."""
    return -sum(logprob for logprob, _ in items) / math.log(2) / sum(size for _, size in items)


def letters(doc: dict[str, Any]) -> list[str]:
    """The letters of an item's options."""
    return list(LETTERS[: len(doc["choices"])])


def gold(doc: dict[str, Any]) -> int:
    """Index of the right option."""
    return int(doc["gold"])


def likeliest(logprobs: Sequence[float]) -> int:
    """Index of the highest log-probability; the first of equals."""
    return max(range(len(logprobs)), key=logprobs.__getitem__)


def _options(doc: dict[str, Any]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, doc["choices"], strict=False))


def korean_question(doc: dict[str, Any]) -> str:
    """KMMLU's own prompt (Son et al. 2024), without exemplars."""
    return f"{doc['question'].strip()}\n{_options(doc)}\n정답："


def english_question(doc: dict[str, Any]) -> str:
    """MMLU's own prompt (Hendrycks et al. 2021), without exemplars."""
    head = f"The following are multiple choice questions (with answers) about {doc['subject']}."
    return f"{head}\n\n{doc['question'].strip()}\n{_options(doc)}\nAnswer:"


def prompt(doc: dict[str, Any]) -> str:
    """A prompt that the item already holds."""
    return str(doc["prompt"])


def reference(doc: dict[str, Any]) -> str:
    """The reference translation."""
    return str(doc["reference"])


def translated(doc: dict[str, Any], results: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Reference and hypothesis under each metric's name; the metrics are of the whole set."""
    pair = (str(doc["reference"]), " ".join(str(results[0]).split()))
    return {"chrf++": pair, "bleu": pair}


def chrf(items: Sequence[tuple[str, str]]) -> float:
    """chrF++ of (reference, hypothesis) pairs."""
    from hcx.evals.translation_metrics import metric

    return metric("chrf++").corpus(items)


def bleu_english(items: Sequence[tuple[str, str]]) -> float:
    """BLEU with sacrebleu's 13a words."""
    from hcx.evals.translation_metrics import metric

    return metric("bleu", "13a").corpus(items)


def bleu_korean(items: Sequence[tuple[str, str]]) -> float:
    """BLEU over characters: Korean words carry their particles, and a morpheme splitter is not everywhere."""
    from hcx.evals.translation_metrics import metric

    return metric("bleu", "char").corpus(items)


def bleu_chinese(items: Sequence[tuple[str, str]]) -> float:
    """BLEU with sacrebleu's Chinese characters."""
    from hcx.evals.translation_metrics import metric

    return metric("bleu", "zh").corpus(items)
