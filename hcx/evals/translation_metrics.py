"""chrF++ and BLEU through sacrebleu, with the per-segment counts that resampling needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from hcx.errors import MissingExtra

Pairs = Sequence[tuple[str, str]]


class TranslationMetric:
    """A corpus metric that is a function of summed per-segment counts.

    Attributes:
        signature: sacrebleu's signature, which makes the number reproducible.
    """

    def __init__(self, scorer: Any) -> None:
        self._scorer = scorer

    def counts(self, pairs: Pairs) -> np.ndarray:
        """Sufficient statistics of each (reference, hypothesis) pair: `[pairs, counts]`."""
        references = [reference for reference, _ in pairs]
        hypotheses = [hypothesis for _, hypothesis in pairs]
        return np.asarray(self._scorer._extract_corpus_statistics(hypotheses, [references]), dtype=np.int64)

    def score(self, counts: np.ndarray) -> float:
        """The corpus score of some rows of `counts`."""
        return float(self._scorer._aggregate_and_compute(counts.tolist()).score)

    def corpus(self, pairs: Pairs) -> float:
        """The corpus score of pairs."""
        return self.score(self.counts(pairs))

    @property
    def signature(self) -> str:
        """How sacrebleu was set, after at least one score."""
        return str(self._scorer.get_signature())


@cache
def metric(name: str, tokenize: str = "13a") -> TranslationMetric:
    """`chrf++`, or `bleu` with one of sacrebleu's tokenizers.

    Raises:
        MissingExtra: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise MissingExtra("sacrebleu", "eval", "scoring translations") from None
    return TranslationMetric(CHRF(word_order=2) if name == "chrf++" else BLEU(tokenize=tokenize, force=True))
