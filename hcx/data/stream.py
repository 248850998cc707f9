"""Where the rows of one language lie: an endless, reproducible cut of its documents into rows.

In each epoch the documents are put in a new order (a permutation seeded by seed, language and epoch) and joined into
one stream with an end-of-text token in front. Row k of the epoch has the inputs `stream[k*S : (k+1)*S]` and the labels
one further on, so every token of every document is a label exactly once per epoch; the last row is filled up with
positions of weight 0. The rows of an epoch come in an order of their own, because neighbouring rows hold pieces of the
same long document.

An end-of-text token opens the segment that follows it: positions restart there and attention sees nothing before it.
So a document's first token is predicted from end-of-text alone, and the end-of-text that closes a document is
predicted from inside it. A document cut by a row's end goes on in another row without its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from hcx.data.batch import MicroBatch
from hcx.data.shards import Shard
from hcx.dist.seeding import derived_seed


@dataclass(frozen=True)
class Row:
    """One row of a batch; all `[seq]`.

    Attributes:
        tokens: inputs.
        labels: the token after each input; end-of-text where there is none.
        weights: 1 where there is a label, else 0.
        positions: restart at 0 in each document.
        document_ids: 0, 1, ... within the row.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    positions: NDArray[np.int64]
    document_ids: NDArray[np.int64]


def segments(starts: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions and document ids of a row, from where its segments start; the first position always starts one."""
    starts = starts.copy()
    starts[0] = True
    document_ids = np.cumsum(starts) - 1
    where = np.flatnonzero(starts)
    return np.arange(len(starts)) - where[document_ids], document_ids


def stack_rows(rows: Sequence[Row], sample_ids: tuple[int, ...] = (), sources: tuple[str, ...] = ()) -> MicroBatch:
    """Rows of equal length as one micro-batch."""

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))

    return MicroBatch(
        tokens=stacked("tokens"),
        labels=stacked("labels"),
        weights=stacked("weights"),
        positions=stacked("positions"),
        document_ids=stacked("document_ids"),
        sample_ids=sample_ids,
        sources=sources,
    )


class LanguageStream:
    """The rows of one language, by number.

    Args:
        shard: its training documents.
        name: the language; part of the seed.
        seq_len: tokens per row.
        seed: orders documents and rows.
        eos_id: the end-of-text token.
    """

    def __init__(self, shard: Shard, name: str, seq_len: int, seed: int, eos_id: int) -> None:
        self._shard = shard
        self._name = name
        self._seq_len = seq_len
        self._seed = seed
        self._eos_id = eos_id
        self.num_tokens = int(shard.lengths.sum())
        self.rows_per_epoch = -(-self.num_tokens // seq_len)
        # Per stream, not per class; two epochs are in use where one ends.
        self._order = lru_cache(maxsize=3)(self._make_order)

    def _make_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Documents of the epoch in order, the stream position where each ends, and the order of the rows."""
        random = np.random.Generator(np.random.PCG64(derived_seed(self._seed, "data", self._name, epoch)))
        documents = random.permutation(self._shard.num_documents)
        ends = np.cumsum(self._shard.lengths[documents])
        return documents, ends, random.permutation(self.rows_per_epoch)

    def row(self, number: int) -> Row:
        """Row `number`, counted over all epochs."""
        epoch, index = divmod(number, self.rows_per_epoch)
        documents, ends, rows = self._order(epoch)
        first = int(rows[index]) * self._seq_len  # of the labels, in the epoch's stream without the leading end-of-text
        last = min(first + self._seq_len, self.num_tokens)
        size = last - first
        # One token more at the left: the input before the first label.
        stream = np.full(self._seq_len + 1, self._eos_id, dtype=np.int64)
        starts = np.zeros(self._seq_len + 1, dtype=bool)
        if first == 0:
            starts[0] = True
        position = max(first - 1, 0)
        while position < last:
            place = int(np.searchsorted(ends, position, side="right"))
            document = int(documents[place])
            begin = int(ends[place] - self._shard.lengths[document])
            stop = min(int(ends[place]), last)
            source = int(self._shard.starts[document])
            offset = position - first + 1
            stream[offset : offset + stop - position] = self._shard.tokens[
                source + position - begin : source + stop - begin
            ]
            if stop == int(ends[place]):
                starts[stop - first] = True  # the end-of-text just copied opens the next segment
            position = stop
        weights = np.zeros(self._seq_len, dtype=np.float32)
        weights[:size] = 1.0
        # Padding is a segment of its own: its first input is the epoch's last end-of-text.
        positions, document_ids = segments(starts[:-1])
        return Row(stream[:-1], stream[1:].copy(), weights, positions, document_ids)
