"""Held-out documents, scored whole, and the accounting of bits per byte.

bits per byte = sum over documents of -log2 p(tokens of the document, its end-of-text included) / UTF-8 bytes of the
documents. The first token's context is end-of-text, as in training. A document longer than a row is cut into windows
that do not overlap; a later window's first token is predicted from the one token before it. The n-gram baseline
(`hcx.data.kneser_ney`) is scored on the same tokens over the same bytes, so the numbers can stand in one table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hcx.data.batch import MicroBatch
from hcx.data.shards import Shard, ShardSet
from hcx.data.stream import Row, segments, stack_rows
from hcx.errors import ConfigError, DataError


def validation_batches(
    shards: ShardSet, language: str, seq_len: int, micro_batch: int, limit: int | None = None, first: int = 0
) -> Iterator[MicroBatch]:
    """Micro-batches that hold every token of the held-out documents as a label of weight 1, exactly once.

    Short documents share rows (apart by `document_ids`); a document, or a window of it, is never cut again to fill a
    row. `sources` names the language of each row.

    Args:
        shards: where the documents are.
        language: which language's.
        seq_len: tokens per row.
        micro_batch: rows per micro-batch; the last one may have fewer.
        limit: only so many documents (they are in mixed order); None: all.
        first: number of the first one.

    Raises:
        ConfigError: a number is out of range.
        DataError: there are no such documents.
    """
    if min(seq_len, micro_batch) < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"seq_len = {seq_len}, micro_batch = {micro_batch}, limit = {limit}: must be at least 1")
    shard = _held_out(shards, language)
    if not 0 <= first < shard.num_documents:
        raise DataError(
            f"{shards.directory}: {language} has {shard.num_documents} held-out documents, none from number {first} on"
        )
    rows: list[Row] = []
    for row in _rows(shard, seq_len, shards.eos_id, first, limit):
        rows.append(row)
        if len(rows) == micro_batch:
            yield stack_rows(rows, sources=(language,) * len(rows))
            rows = []
    if rows:
        yield stack_rows(rows, sources=(language,) * len(rows))


def validation_documents(shards: ShardSet, language: str, limit: int | None = None) -> Iterator[np.ndarray]:
    """The tokens of each held-out document, end-of-text last."""
    shard = _held_out(shards, language)
    for number in range(_count(shard, limit)):
        yield np.asarray(shard.document(number), dtype=np.int64)


def validation_bytes(shards: ShardSet, language: str, limit: int | None = None) -> int:
    """UTF-8 bytes of the documents that `validation_batches` with the same limit scores."""
    shard = _held_out(shards, language)
    total = int(shard.document_bytes[: _count(shard, limit)].sum())
    if total == 0:
        raise DataError(f"{shards.directory}: the bytes of {language} documents are not known; build the shards again")
    return total


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A sum of negative natural log-probabilities over documents, as bits per UTF-8 byte."""
    return nats / math.log(2) / num_bytes


def _held_out(shards: ShardSet, language: str) -> Shard:
    shard = shards.shard(language, "validation")
    if shard.num_documents == 0:
        raise DataError(f"{shards.directory}: {language} has no held-out documents")
    return shard


def _count(shard: Shard, limit: int | None) -> int:
    return shard.num_documents if limit is None else min(limit, shard.num_documents)


def _rows(shard: Shard, seq_len: int, eos_id: int, first: int, limit: int | None) -> Iterator[Row]:
    """Packs windows into rows in order; a window that does not fit opens a new row."""
    windows: list[tuple[np.ndarray, np.ndarray]] = []
    used = 0
    for number in range(first, _count(shard, None if limit is None else first + limit)):
        document = np.concatenate([[eos_id], np.asarray(shard.document(number), dtype=np.int64)])
        for begin in range(0, len(document) - 1, seq_len):
            labels = document[begin + 1 : begin + 1 + seq_len]
            if used + len(labels) > seq_len:
                yield _pack(windows, seq_len, eos_id)
                windows, used = [], 0
            windows.append((document[begin : begin + len(labels)], labels))
            used += len(labels)
    if windows:
        yield _pack(windows, seq_len, eos_id)


def _pack(windows: list[tuple[np.ndarray, np.ndarray]], seq_len: int, eos_id: int) -> Row:
    tokens = np.full(seq_len, eos_id, dtype=np.int64)
    labels = np.full(seq_len, eos_id, dtype=np.int64)
    weights = np.zeros(seq_len, dtype=np.float32)
    starts = np.zeros(seq_len, dtype=bool)
    place = 0
    for inputs, targets in windows:
        starts[place] = True
        tokens[place : place + len(inputs)] = inputs
        labels[place : place + len(targets)] = targets
        weights[place : place + len(targets)] = 1.0
        place += len(targets)
    if place < seq_len:
        starts[place] = True  # padding is a segment of its own
    positions, document_ids = segments(starts)
    return Row(tokens, labels, weights, positions, document_ids)
