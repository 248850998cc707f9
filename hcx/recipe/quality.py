"""Held-out quality of a model and of its compressed versions, on the same rows in one pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hcx.data import ShardSet, validation_batches, validation_bytes
from hcx.errors import CheckpointError
from hcx.model.load import LoadedModel, load_model
from hcx.model.meta import ForwardMeta

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums over rows with its 95 % interval; rows are taken as independent."""

    value: float
    low: float
    high: float


@dataclass
class ModelFigures:
    """What was measured of one model, by language."""

    label: str
    directory: Path
    bits_per_byte: dict[str, Estimate] = field(default_factory=dict)
    kl: dict[str, Estimate] = field(default_factory=dict)
    top1: dict[str, Estimate] = field(default_factory=dict)


@dataclass
class QualityFigures:
    """All models; the first one is the reference of divergence."""

    models: list[ModelFigures]
    documents: dict[str, int]
    tokens: dict[str, int]
    num_bytes: dict[str, int]

    def as_rows(self) -> list[dict[str, Any]]:
        """One object per model and language, for scripts."""
        return [
            {
                "model": model.label,
                "language": language,
                "bits_per_byte": model.bits_per_byte[language].value,
                "kl": model.kl[language].value if language in model.kl else None,
                "top1": model.top1[language].value if language in model.top1 else None,
            }
            for model in self.models
            for language in model.bits_per_byte
        ]

    def table_rows(self) -> list[tuple[str, ...]]:
        """Model, language, bits per byte, KL, agreement: with intervals, for people."""
        rows: list[tuple[str, ...]] = []
        for model in self.models:
            for language, found in model.bits_per_byte.items():
                kl, top1 = model.kl.get(language), model.top1.get(language)
                rows.append(
                    (
                        model.label,
                        language,
                        f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})",
                        "" if kl is None else f"{kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f})",
                        "" if top1 is None else f"{top1.value:.1%}",
                    )
                )
        return rows


@torch.no_grad()
def measure_quality(
    models: Sequence[tuple[str, str | Path]],
    shards_directory: str | Path,
    seq_len: int = 256,
    micro_batch: int = 8,
    max_documents: int | None = None,
) -> QualityFigures:
    """Bits per byte of every model, and divergence of all but the first from the first.

    Args:
        models: (label, MODEL directory); full precision first. One vocabulary.
        shards_directory: whose held-out documents are scored.
        seq_len: tokens per row.
        micro_batch: rows per forward.
        max_documents: per language; all if not given.

    Raises:
        CheckpointError: a model was trained with another tokenizer than the shards'.
    """
    shards = ShardSet.open(shards_directory)
    loaded = [(label, load_model(directory)) for label, directory in models]
    for label, model in loaded:
        if model.tokenizer is not None and model.tokenizer.digest != shards.tokenizer_digest:
            raise CheckpointError(
                f"{label} ({model.directory}) has another tokenizer than the shards in {shards_directory}; "
                "measure it on shards built with its own tokenizer"
            )
    figures = QualityFigures([ModelFigures(label, Path(directory)) for label, directory in models], {}, {}, {})
    for language in shards.languages:
        held_out = shards.shard(language, "validation").num_documents
        if held_out == 0:
            continue
        sums: dict[tuple[int, str], list[float]] = defaultdict(list)
        counts: list[float] = []
        for batch in validation_batches(shards, language, seq_len, micro_batch, max_documents):
            meta = ForwardMeta(positions=batch.positions, document_ids=batch.document_ids)
            hidden = [model.decoder(batch.tokens, meta) for _, model in loaded]
            for row in range(batch.tokens.shape[0]):
                counted = batch.weights[row] > 0
                counts.append(float(counted.sum()))
                _score_row(loaded, hidden, row, counted, batch.labels[row], sums)
        num_bytes = validation_bytes(shards, language, max_documents)
        total = sum(counts)
        figures.documents[language] = held_out if max_documents is None else min(held_out, max_documents)
        figures.tokens[language], figures.num_bytes[language] = round(total), num_bytes
        for index, model_figures in enumerate(figures.models):
            # Bytes are known per document, not per row: the spread over rows is that of nats per token.
            to_bits = total / num_bytes / math.log(2)
            model_figures.bits_per_byte[language] = ratio_estimate(sums[index, "nats"], counts, to_bits)
            if index:
                model_figures.kl[language] = ratio_estimate(sums[index, "kl"], counts)
                model_figures.top1[language] = ratio_estimate(sums[index, "top1"], counts)
    return figures


def _score_row(
    loaded: Sequence[tuple[str, LoadedModel]],
    hidden: Sequence[torch.Tensor],
    row: int,
    counted: torch.Tensor,
    labels: torch.Tensor,
    sums: dict[tuple[int, str], list[float]],
) -> None:
    reference: torch.Tensor | None = None
    for index, (_, model) in enumerate(loaded):
        logprobs = model.decoder.output(hidden[index][:, row : row + 1]).logits()[0, counted].log_softmax(-1)
        picked = logprobs.gather(-1, labels[counted, None])
        sums[index, "nats"].append(-float(picked.sum(dtype=torch.float64)))
        if reference is None:
            reference = logprobs
        else:
            divergence = reference.exp() * (reference - logprobs)
            sums[index, "kl"].append(float(divergence.sum(dtype=torch.float64)))
            sums[index, "top1"].append(float((reference.argmax(-1) == logprobs.argmax(-1)).sum()))


def ratio_estimate(values: Sequence[float], sizes: Sequence[float], factor: float = 1.0) -> Estimate:
    """`factor * sum(values) / sum(sizes)`; the interval by linearisation over rows."""
    total, count = sum(sizes), len(values)
    ratio = sum(values) / total
    spread = sum((value - ratio * size) ** 2 for value, size in zip(values, sizes, strict=True))
    half = Z95 * math.sqrt(count / max(1, count - 1) * spread) / total
    return Estimate(factor * ratio, factor * (ratio - half), factor * (ratio + half))
