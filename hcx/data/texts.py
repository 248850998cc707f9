"""Sources to documents: every stage between reading and tokenizing, and the account of what each did.

The stages run in one fixed order, and each is a function of the documents and the recipe alone: normalise, mask
personal data, shortest length, quality, division into splits, byte budgets; then over all languages exact
de-duplication, near-duplicates (held-out documents first in both), and decontamination of the training text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcx.data.dedup import Deduplicator
from hcx.data.document import TEST, Document
from hcx.data.filters import Decontaminator, NearDeduplicator, StageCounts, mask_pii, normalise, quality_reason
from hcx.data.filters.evaluation import read_items
from hcx.data.recipe import DataRecipe, LanguageConfig
from hcx.data.shards import SPLITS
from hcx.data.shipped import name_fraction
from hcx.data.sources import read_source
from hcx.errors import DataError

ALWAYS_TOLD = ("short", "duplicate", "over_budget")
"""Reasons that are told even where no document was dropped for them."""


@dataclass
class LanguageText:
    """What is left of a language's sources, and what was taken out.

    Attributes:
        documents: by split.
        stages: what each stage did, in the order in which they ran.
        contamination: evaluation set -> documents of this language that held one of its items.
    """

    documents: dict[str, list[Document]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    stages: dict[str, StageCounts] = field(default_factory=dict)
    contamination: Counter[str] = field(default_factory=Counter)

    def stage(self, name: str) -> StageCounts:
        """The counts of a stage, which is new or ran before."""
        return self.stages.setdefault(name, StageCounts())

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> documents left out, over all stages."""
        total = Counter(dict.fromkeys(ALWAYS_TOLD, 0))
        for stage in self.stages.values():
            total.update(stage.dropped)
        return total


@dataclass(eq=False)
class Texts(dict[str, LanguageText]):
    """Language -> its text; with what was found of evaluation sets in all of them."""

    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_texts(recipe: DataRecipe, folder: Path) -> Texts:
    """The documents of every language after all stages.

    Held-out documents go through the de-duplicators first, over all languages, so that no training document equals a
    held-out one.

    Args:
        recipe: what to read.
        folder: where the recipe lies; relative paths are relative to it unless the recipe names a root.

    Raises:
        DataError: a source cannot be read, or a language has no training text left.
    """
    folder = recipe.folder(folder)
    texts = Texts()
    texts.update({name: _read_language(config, recipe, folder) for name, config in recipe.languages.items()})
    exact = Deduplicator()
    _over_splits(texts, "exact_duplicates", "duplicate", exact.keep)
    filters = recipe.filters
    if filters.near_duplicates is not None:
        _over_splits(texts, "near_duplicates", "near_duplicate", NearDeduplicator(filters.near_duplicates).keep)
    if filters.decontaminate is not None:
        items: dict[str, list[str]] = {}
        for source in filters.decontaminate.against:
            items.setdefault(source.name, []).extend(read_items(source, folder))
        decontaminator = Decontaminator(items, filters.decontaminate)
        for text in texts.values():
            _decontaminate(text, decontaminator)
        texts.evaluation = {name: counts.to_json() for name, counts in decontaminator.sets.items()}
    for name, text in texts.items():
        if not text.documents["train"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in text.dropped.items() if count)
            raise DataError(
                f"languages.{name}: no training document is left ({reasons or 'the sources are empty'}); "
                "check its sources and filters"
            )
        for split, documents in text.documents.items():
            # Mixed once here: the first n of a held-out split are then a fair sample.
            documents.sort(key=lambda d: name_fraction(f"{recipe.seed}/{split}/{d.source}/{d.name}"))
    return texts


def _read_language(config: LanguageConfig, recipe: DataRecipe, folder: Path) -> LanguageText:
    text = LanguageText()
    for source in config.sources:
        used = dict.fromkeys(SPLITS, 0)
        limit = float("inf") if source.max_bytes is None else float(source.max_bytes)
        budget = {"train": limit, "validation": limit * recipe.validation_fraction}
        for found in read_source(source, folder):
            document = _cleaned(found, config, recipe, text)
            if document is None:
                continue
            split = document.split
            if split is None:
                held_out = (
                    name_fraction(f"{recipe.seed}/{document.source}/{document.name}") < recipe.validation_fraction
                )
                split = "validation" if held_out else "train"
            stage = text.stage("budget")
            stage.seen += 1
            size = utf8_bytes(document)
            if used[split] + size > budget[split]:
                stage.dropped["over_budget"] += 1
                continue
            used[split] += size
            text.documents[split].append(document)
    return text


def _cleaned(document: Document, config: LanguageConfig, recipe: DataRecipe, text: LanguageText) -> Document | None:
    """A document after the stages that look at it alone; None if one dropped it."""
    filters = recipe.filters
    stage = text.stage("read")
    stage.seen += 1
    if document.split == TEST:
        stage.dropped["test_split"] += 1
        return None
    if filters.normalise is not None:
        stage = text.stage("normalise")
        stage.seen += 1
        changed = normalise(document.text, filters.normalise)
        stage.changed += changed != document.text
        document = document.with_text(changed)
    if filters.pii is not None:
        stage = text.stage("pii")
        stage.seen += 1
        masked, counts = mask_pii(document.text, filters.pii)
        stage.changed += bool(counts)
        stage.details.update(counts)
        document = document.with_text(masked)
    stage = text.stage("length")
    stage.seen += 1
    if len(document.text) < recipe.min_document_characters or not document.text.strip():
        stage.dropped["short"] += 1
        return None
    if config.quality is not None:
        stage = text.stage("quality")
        stage.seen += 1
        reason = quality_reason(document.text, config.quality)
        if reason is not None:
            stage.dropped[reason] += 1
            return None
    return document


def _over_splits(texts: Texts, name: str, reason: str, keep: Callable[[list[Document]], list[Document]]) -> None:
    for split in ("validation", "train"):
        for text in texts.values():
            documents = text.documents[split]
            text.documents[split] = keep(documents)
            stage = text.stage(name)
            stage.seen += len(documents)
            stage.dropped[reason] += len(documents) - len(text.documents[split])


def _decontaminate(text: LanguageText, decontaminator: Decontaminator) -> None:
    stage = text.stage("decontaminate")
    before = {name: counts.documents for name, counts in decontaminator.sets.items()}
    kept = []
    for document in text.documents["train"]:
        stage.seen += 1
        clean = decontaminator.clean(document)
        if clean is None:
            stage.dropped["contaminated"] += 1
            continue
        stage.changed += clean.text != document.text
        kept.append(clean)
    text.documents["train"] = kept
    for name, counts in decontaminator.sets.items():
        text.contamination[name] += counts.documents - before[name]


def utf8_bytes(document: Document) -> int:
    """The document's size, which bits per byte divides by.

    Raises:
        DataError: the text holds a lone surrogate (JSON can write one, UTF-8 cannot).
    """
    try:
        return len(document.text.encode())
    except UnicodeEncodeError as error:
        raise DataError(
            f"{document.source}: {document.name}: a lone surrogate at character {error.start} is not text; "
            "mend or drop the document"
        ) from None


def training_texts(texts: dict[str, LanguageText], max_bytes_per_language: int) -> Iterator[str]:
    """What a tokenizer learns from: training documents, up to a number of UTF-8 bytes of each language."""
    for text in texts.values():
        used = 0
        for document in text.documents["train"]:
            used += utf8_bytes(document)
            if used > max_bytes_per_language:
                break
            yield document.text
