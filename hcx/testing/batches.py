"""Random packed micro-batches with document bounds and uneven weights."""

from __future__ import annotations

import torch

from hcx.data.batch import MicroBatch


def packed_rows(rows: int, seq_len: int, vocab_size: int, seed: int = 0, max_document: int = 12) -> MicroBatch:
    """Rows of random documents: positions restart, and some targets weigh nothing or less than one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (rows, seq_len + 1), generator=generator)
    positions = torch.zeros(rows, seq_len, dtype=torch.int64)
    documents = torch.zeros(rows, seq_len, dtype=torch.int64)
    for row in range(rows):
        place, document = 0, 0
        while place < seq_len:
            length = min(int(torch.randint(3, max_document, (), generator=generator)), seq_len - place)
            positions[row, place : place + length] = torch.arange(length)
            documents[row, place : place + length] = document
            place, document = place + length, document + 1
    weights = torch.rand(rows, seq_len, generator=generator)
    weights[torch.rand(rows, seq_len, generator=generator) < 0.3] = 0.0
    return MicroBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        weights=weights,
        positions=positions,
        document_ids=documents,
        sample_ids=tuple(range(rows)),
        sources=tuple("ko" if row % 2 else "en" for row in range(rows)),
    )


def take_rows(batch: MicroBatch, start: int, stop: int) -> MicroBatch:
    """Some rows of a micro-batch."""
    assert batch.document_ids is not None
    return MicroBatch(
        tokens=batch.tokens[start:stop],
        labels=batch.labels[start:stop],
        weights=batch.weights[start:stop],
        positions=batch.positions[start:stop],
        document_ids=batch.document_ids[start:stop],
        sample_ids=batch.sample_ids[start:stop],
        sources=batch.sources[start:stop],
    )


def unpacked(batch: MicroBatch) -> list[MicroBatch]:
    """Every document of a packed micro-batch as a row of its own, padded to the row length with weight 0."""
    assert batch.document_ids is not None
    result = []
    rows, seq_len = batch.tokens.shape
    for row in range(rows):
        for document in batch.document_ids[row].unique():
            where = batch.document_ids[row] == document
            length = int(where.sum())

            def pad(values: torch.Tensor, where: torch.Tensor = where, length: int = length) -> torch.Tensor:
                out = torch.zeros(1, seq_len, dtype=values.dtype)
                out[0, :length] = values[where]
                return out

            result.append(
                MicroBatch(
                    tokens=pad(batch.tokens[row]),
                    labels=pad(batch.labels[row]),
                    weights=pad(batch.weights[row]),
                    positions=torch.arange(seq_len)[None],
                )
            )
    return result
