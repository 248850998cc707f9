"""Text to shards: read and clean (`hcx.data.texts`), tokenize, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hcx.artifacts import Input, artifact_input, digest_file, digest_json, new_artifact
from hcx.data.document import Document
from hcx.data.recipe import CodeSource, DataRecipe, ExistingTokenizer, Source
from hcx.data.shards import TOKENIZER_FOLDER, ShardSet, token_dtype, write_megatron
from hcx.data.sources import source_files
from hcx.data.texts import LanguageText, read_texts, training_texts, utf8_bytes
from hcx.errors import DataError
from hcx.obs import Progress, get_logger
from hcx.tokenizer import Tokenizer, train_tokenizer

__all__ = ["LanguageText", "build_shards", "read_texts", "training_texts", "utf8_bytes"]

_logger = get_logger(__name__)
_BATCH = 256
"""Documents encoded at once."""
_MAX_SOURCES = 1 << 16


def build_shards(recipe: DataRecipe, out: str | Path, folder: str | Path = ".", overwrite: bool = False) -> ShardSet:
    """Builds a shard directory.

    The same recipe, sources and tokenizer give the same bytes.

    Args:
        recipe: what to build.
        out: the directory to make.
        folder: where the recipe lies; relative paths are relative to it unless the recipe names a root.
        overwrite: whether to replace an existing directory.

    Raises:
        DataError: a source cannot be read, or a language has no text.
        HcxError: `out` exists and `overwrite` is false.
    """
    beside, folder = Path(folder), recipe.folder(folder)
    with new_artifact(out, "shards", recipe, overwrite=overwrite) as artifact:
        _logger.info("reading text")
        texts = read_texts(recipe, beside)
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
                artifact.inputs += _inputs(source, folder)
        languages: dict[str, Any] = {}
        total = sum(len(documents) for text in texts.values() for documents in text.documents.values())
        with Progress("tokenizing", total, "documents") as progress:
            for name, text in texts.items():
                counts: dict[str, Any] = {
                    split: _write_split(artifact.path / f"{name}-{split}", documents, tokenizer, progress)
                    for split, documents in text.documents.items()
                }
                languages[name] = {
                    **counts,
                    "dropped": dict(text.dropped),
                    "stages": {stage: counted.to_json() for stage, counted in text.stages.items()},
                    "contaminated_documents": dict(text.contamination),
                    "licences": _licences(text),
                }
        whole = sum(config.share for config in recipe.languages.values())
        artifact.counts.update(
            languages=languages,
            shares={name: config.share / whole for name, config in recipe.languages.items()},
            evaluation=texts.evaluation,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_digest=tokenizer.digest,
        )
    return ShardSet.open(out)


def _inputs(source: Source, folder: Path) -> list[Input]:
    files = source_files(source, folder)
    if isinstance(source, CodeSource):
        # A tree is one input: ten thousand entries would hide the others.
        root = folder / source.path
        digest = digest_json({path.relative_to(root).as_posix(): digest_file(path) for path in files})
        return [Input(role="text", kind="tree", path=str(root), digest=digest)]
    return [artifact_input("text", path) for path in files]


def _licences(text: LanguageText) -> dict[str, int]:
    """Training documents by licence."""
    counts = Counter(document.licence or "not stated" for document in text.documents["train"])
    return dict(sorted(counts.items()))


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
    numbers: dict[tuple[str, float], int] = {}
    sources = [numbers.setdefault((document.source, document.upsample), len(numbers)) for document in documents]
    if len(numbers) > _MAX_SOURCES:
        raise DataError(f"{prefix.name}: {len(numbers)} sources, at most {_MAX_SOURCES} can be told apart")
    of_source = np.asarray(sources, dtype=np.uint16)
    np.save(f"{prefix}.sources.npy", of_source, allow_pickle=False)
    entries = [
        {
            "name": name,
            "upsample": factor,
            "documents": int((of_source == number).sum()),
            "tokens": int(lengths[of_source == number].sum()),
            "bytes": int(sizes[of_source == number].sum()),
        }
        for (name, factor), number in numbers.items()
    ]
    by_name: Counter[str] = Counter()
    for entry in entries:
        by_name[str(entry["name"])] += int(str(entry["bytes"]))
    return {
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "bytes": int(sizes.sum()),
        "sources": entries,
        "source_bytes": dict(sorted(by_name.items())),
    }
