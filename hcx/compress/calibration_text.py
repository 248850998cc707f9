"""The text that calibration reads: rows of training documents, each language with the share that the user set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcx.compress.plan import Calibration
from hcx.data import MicroBatch, ShardSet
from hcx.data.stream import Row, segments, stack_rows
from hcx.dist.seeding import derived_seed
from hcx.errors import ConfigError, DataError, did_you_mean
from hcx.tokenizer import Tokenizer

MICRO_BATCH = 8
"""Rows per forward."""


def calibration_batches(
    settings: Calibration,
    max_seq_len: int,
    tokenizer: Tokenizer | None,
    shards: ShardSet | None = None,
    folder: Path | None = None,
) -> list[MicroBatch]:
    """Rows of calibration text.

    Args:
        settings: how much, of which languages, and the files if it is not from shards.
        max_seq_len: the model's context; rows are no longer.
        tokenizer: the model's; needed for text files, and must be the shards' if both are given.
        shards: whose training documents are read where `settings.texts` is empty; never the held-out ones.
        folder: relative paths of text files are relative to it; the working directory if not given.

    Raises:
        ConfigError: shares name other languages than there are, or sum to nothing.
        DataError: there is less text than asked for, or it does not fit the model.
    """
    if settings.texts:
        if tokenizer is None:
            raise DataError("calibration.texts: this model directory has no tokenizer.json to read text with")
        documents: dict[str, Iterator[NDArray[np.int64]]] = {
            language: _file_documents(paths, tokenizer, folder or Path()) for language, paths in settings.texts.items()
        }
        eos = tokenizer.eos_id
    elif shards is not None:
        if tokenizer is not None and tokenizer.digest != shards.tokenizer_digest:
            raise DataError(
                f"{shards.directory}: these shards were made with another tokenizer than the model's; build shards "
                "with the model's tokenizer, or name text files in calibration.texts"
            )
        documents = {language: _shard_documents(shards, language, settings.seed) for language in shards.languages}
        eos = shards.eos_id
    else:
        raise ConfigError(
            "this plan reads calibration text: name shards (--calibration DIR), or files in calibration.texts"
        )
    shares = _shares(settings, documents, shards)
    seq_len = min(settings.seq_len, max_seq_len)
    rows: list[tuple[str, Row]] = []
    for language, share in shares.items():
        wanted = -(-round(settings.tokens * share) // seq_len)
        found = list(_rows(documents[language], seq_len, eos, wanted))
        if len(found) < wanted:
            raise DataError(
                f"calibration: {language} has text for {len(found) * seq_len:,} tokens, its share needs "
                f"{wanted * seq_len:,}; give more text, or lower calibration.tokens or calibration.shares.{language}"
            )
        rows += [(language, row) for row in found]
    return [
        stack_rows(
            [row for _, row in rows[i : i + MICRO_BATCH]], sources=tuple(n for n, _ in rows[i : i + MICRO_BATCH])
        )
        for i in range(0, len(rows), MICRO_BATCH)
    ]


def _shares(settings: Calibration, documents: Mapping[str, object], shards: ShardSet | None) -> dict[str, float]:
    given = dict(settings.shares)
    if not given:
        given = shards.shares if shards is not None and not settings.texts else dict.fromkeys(documents, 1.0)
    for language in given:
        if language not in documents:
            raise ConfigError(f"calibration.shares.{language}: no such text; {did_you_mean(language, documents)}")
    total = sum(given.values())
    if total <= 0:
        raise ConfigError("calibration.shares: they sum to nothing; give at least one language a share above 0")
    return {language: share / total for language, share in given.items() if share > 0}


def _shard_documents(shards: ShardSet, language: str, seed: int) -> Iterator[NDArray[np.int64]]:
    shard = shards.shard(language, "train")
    order = np.random.default_rng(derived_seed(seed, "calibration", language)).permutation(shard.num_documents)
    for number in order:
        yield np.asarray(shard.document(int(number)), dtype=np.int64)


def _file_documents(paths: tuple[str, ...], tokenizer: Tokenizer, folder: Path) -> Iterator[NDArray[np.int64]]:
    for name in paths:
        path = folder / name
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"calibration.texts: {path}: cannot be read as UTF-8 text ({error})") from None
        yield np.asarray([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int64)


def _rows(documents: Iterator[NDArray[np.int64]], seq_len: int, eos: int, wanted: int) -> Iterator[Row]:
    """Rows cut from the documents joined with an end-of-text in front, as in training; none is filled up."""
    stream = np.asarray([eos], dtype=np.int64)
    made = 0
    for document in documents:
        if made == wanted:
            return
        stream = np.concatenate([stream, document])
        while len(stream) > seq_len and made < wanted:
            tokens = stream[:seq_len]
            positions, document_ids = segments(tokens == eos)
            yield Row(tokens, stream[1 : seq_len + 1], np.ones(seq_len, np.float32), positions, document_ids)
            stream = stream[seq_len:]
            made += 1
