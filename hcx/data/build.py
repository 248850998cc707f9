"""Text to shards: read, filter, divide, de-duplicate, tokenize, write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hcx.artifacts import artifact_input, new_artifact
from hcx.data.dedup import Deduplicator
from hcx.data.document import Document
from hcx.data.recipe import DataRecipe, ExistingTokenizer, LanguageConfig
from hcx.data.shards import SPLITS, TOKENIZER_FOLDER, ShardSet, token_dtype, write_megatron
from hcx.data.shipped import name_fraction
from hcx.data.sources import read_source, source_files
from hcx.errors import DataError
from hcx.obs import Progress, get_logger
from hcx.tokenizer import Tokenizer, train_tokenizer

_logger = get_logger(__name__)
_BATCH = 256
"""Documents encoded at once."""


@dataclass
class LanguageText:
    """What is left of a language's sources, and what was taken out."""

    documents: dict[str, list[Document]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    dropped: dict[str, int] = field(default_factory=lambda: {"short": 0, "duplicate": 0, "over_budget": 0})


def read_texts(recipe: DataRecipe, folder: Path) -> dict[str, LanguageText]:
    """The documents of every language after filtering, division and de-duplication.

    Held-out documents go through the de-duplicator first, over all languages, so that no training document equals a
    held-out one.

    Args:
        recipe: what to read.
        folder: what its relative paths are relative to.
    """
    texts = {name: _read_language(config, recipe, folder) for name, config in recipe.languages.items()}
    deduplicator = Deduplicator()
    for split in ("validation", "train"):
        for text in texts.values():
            before = deduplicator.duplicates
            text.documents[split] = deduplicator.keep(text.documents[split])
            text.dropped["duplicate"] += deduplicator.duplicates - before
    for name, text in texts.items():
        if not text.documents["train"]:
            raise DataError(f"languages.{name}: no training document is left; check its sources and filters")
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
        for document in read_source(source, folder):
            if len(document.text) < recipe.min_document_characters or not document.text.strip():
                text.dropped["short"] += 1
                continue
            split = document.split
            if split is None:
                held_out = (
                    name_fraction(f"{recipe.seed}/{document.source}/{document.name}") < recipe.validation_fraction
                )
                split = "validation" if held_out else "train"
            size = utf8_bytes(document)
            if used[split] + size > budget[split]:
                text.dropped["over_budget"] += 1
                continue
            used[split] += size
            text.documents[split].append(document)
    return text


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


def build_shards(recipe: DataRecipe, out: str | Path, folder: str | Path = ".", overwrite: bool = False) -> ShardSet:
    """Builds a shard directory.

    The same recipe, sources and tokenizer give the same bytes.

    Args:
        recipe: what to build.
        out: the directory to make.
        folder: what the recipe's relative paths are relative to.
        overwrite: whether to replace an existing directory.

    Raises:
        DataError: a source cannot be read, or a language has no text.
        HcxError: `out` exists and `overwrite` is false.
    """
    folder = Path(folder)
    with new_artifact(out, "shards", recipe, overwrite=overwrite) as artifact:
        _logger.info("reading text")
        texts = read_texts(recipe, folder)
        choice = recipe.tokenizer
        if isinstance(choice, ExistingTokenizer):
            tokenizer = Tokenizer.load(folder / choice.path)
            artifact.inputs.append(artifact_input("tokenizer", folder / choice.path))
        else:
            _logger.info("training a tokenizer of %d ids", choice.vocab_size)
            tokenizer = train_tokenizer(
                training_texts(texts, choice.max_bytes_per_language),
                choice.vocab_size,
                choice.pattern,
                choice.algorithm,
            )
        tokenizer.save(artifact.path / TOKENIZER_FOLDER)
        for config in recipe.languages.values():
            for source in config.sources:
                artifact.inputs += [artifact_input("text", path) for path in source_files(source, folder)]
        languages: dict[str, Any] = {}
        total = sum(len(documents) for text in texts.values() for documents in text.documents.values())
        with Progress("tokenizing", total, "documents") as progress:
            for name, text in texts.items():
                counts: dict[str, Any] = {
                    split: _write_split(artifact.path / f"{name}-{split}", documents, tokenizer, progress)
                    for split, documents in text.documents.items()
                }
                languages[name] = {**counts, "dropped": dict(text.dropped)}
        whole = sum(config.share for config in recipe.languages.values())
        artifact.counts.update(
            languages=languages,
            shares={name: config.share / whole for name, config in recipe.languages.items()},
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_digest=tokenizer.digest,
        )
    return ShardSet.open(out)


def _write_split(prefix: Path, documents: list[Document], tokenizer: Tokenizer, progress: Progress) -> dict[str, Any]:
    sizes = np.asarray([utf8_bytes(document) for document in documents], dtype=np.int64)

    def encoded() -> Iterator[np.ndarray]:
        for start in range(0, len(documents), _BATCH):
            batch = documents[start : start + _BATCH]
            for ids in tokenizer.encode_batch([document.text for document in batch]):
                yield np.asarray([*ids, tokenizer.eos_id], dtype=np.int64)
            progress.advance(len(batch))

    lengths = write_megatron(prefix, encoded(), token_dtype(tokenizer.vocab_size))
    np.save(f"{prefix}.bytes.npy", sizes, allow_pickle=False)
    sources: dict[str, int] = {}
    for document, size in zip(documents, sizes, strict=True):
        sources[document.source] = sources.get(document.source, 0) + int(size)
    return {
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "bytes": int(sizes.sum()),
        "source_bytes": dict(sorted(sources.items())),
    }
