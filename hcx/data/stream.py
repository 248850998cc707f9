"""Where the rows of one language lie: an endless, reproducible cut of its documents into rows.

In each epoch the documents are put in a new order (a permutation seeded by seed, language and epoch) and joined into
one stream with an end-of-text token in front. Row k of the epoch has the inputs `stream[k*S : (k+1)*S]` and the labels
one further on, so every token of every document is a label exactly once per epoch; the last row is filled up with
positions of weight 0. The rows of an epoch come in an order of their own, because neighbouring rows hold pieces of the
same long document.

An end-of-text token opens the segment that follows it: positions restart there and attention sees nothing before it.
So a document's first token is predicted from end-of-text alone, and the end-of-text that closes a document is
predicted from inside it. A document cut by a row's end goes on in another row without its beginning.

Sources can be up-sampled: a document whose source has the factor 2.5 comes twice in every epoch, and half of that
source's documents, newly drawn, a third time. Then, and where whole documents are rearranged for filling in the middle
(their sentinels make an epoch longer), an epoch still has the same number of rows, and what goes beyond them is left
out at the end of its order, other documents in each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcx.data.batch import MicroBatch
from hcx.data.fim import Fim, draw
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


@dataclass(frozen=True)
class _Epoch:
    """One epoch's documents, one after another.

    Attributes:
        tokens: where they lie.
        documents: `[entries]`, the number of each.
        starts: `[entries]`, where each begins in `tokens`.
        ends: `[entries]`, the position in the epoch where each ends.
        rows: `[rows]`, the order in which the rows come.
    """

    tokens: NDArray[Any]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    rows: NDArray[np.int64]


class LanguageStream:
    """The rows of one language, by number.

    Args:
        shard: its training documents.
        name: the language; part of the seed.
        seq_len: tokens per row.
        seed: orders documents and rows.
        eos_id: the end-of-text token.
        factors: `[documents]`, how often each document comes in an epoch on average; None: once.
        fim: rearranges documents or pieces of them; None: nothing does.
    """

    def __init__(
        self,
        shard: Shard,
        name: str,
        seq_len: int,
        seed: int,
        eos_id: int,
        factors: NDArray[np.float64] | None = None,
        fim: Fim | None = None,
    ) -> None:
        self._shard = shard
        self._name = name
        self._seq_len = seq_len
        self._seed = seed
        self._eos_id = eos_id
        self._factors = np.ones(shard.num_documents) if factors is None else factors
        self._fim = fim if fim is not None and fim.config.rate_of(name) > 0 else None
        self.num_tokens = round(float((self._factors * shard.lengths).sum()))
        """Tokens of an epoch, up-sampled ones included."""
        self.rows_per_epoch = -(-self.num_tokens // seq_len)
        # Per stream, not per class; two epochs are in use where one ends.
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> _Epoch:
        random = np.random.Generator(np.random.PCG64(derived_seed(self._seed, "data", self._name, epoch)))
        entries = np.repeat(np.arange(self._shard.num_documents), self._factors.astype(np.int64))
        fractions = self._factors % 1
        for fraction in np.unique(fractions[fractions > 0]):
            candidates = random.permutation(np.flatnonzero(fractions == fraction))
            # One document more than fits: an epoch is never short of its rows.
            sizes = np.cumsum(self._shard.lengths[candidates])
            needed = int(np.searchsorted(sizes, fraction * sizes[-1])) + 1
            entries = np.concatenate([entries, candidates[:needed]])
        documents = entries[random.permutation(len(entries))]
        rows = random.permutation(self.rows_per_epoch)
        tokens, starts, lengths = self._shard.tokens, self._shard.starts[documents], self._shard.lengths[documents]
        if self._fim is not None and self._fim.config.level == "document":
            tokens, lengths = self._rearranged(self._fim, documents, epoch)
            starts = np.cumsum(lengths) - lengths
        return _Epoch(tokens, documents, starts, np.cumsum(lengths), rows)

    def _rearranged(
        self, fim: Fim, documents: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All documents of an epoch in memory, and their lengths."""
        random = np.random.Generator(np.random.PCG64(derived_seed(self._seed, "fim", self._name, epoch)))
        rate, psm_share = fim.config.rate_of(self._name), fim.config.psm_share
        texts = [
            fim.document(np.asarray(self._shard.document(int(number)), np.int64), draw(random, rate, psm_share))
            for number in documents
        ]
        return np.concatenate(texts), np.asarray([len(text) for text in texts], np.int64)

    def documents(self, number: int) -> dict[int, int]:
        """Which documents row `number` takes, and how many tokens of each (before any is rearranged)."""
        epoch, first, last = self._place(number)
        taken: dict[int, int] = {}
        position = first
        while position < last:
            place = int(np.searchsorted(epoch.ends, position, side="right"))
            stop = min(int(epoch.ends[place]), last)
            document = int(epoch.documents[place])
            taken[document] = taken.get(document, 0) + stop - position
            position = stop
        return taken

    def _place(self, number: int) -> tuple[_Epoch, int, int]:
        """The epoch of a row, and where its labels begin and end in it (without the leading end-of-text)."""
        which, index = divmod(number, self.rows_per_epoch)
        epoch = self._epoch(which)
        first = int(epoch.rows[index]) * self._seq_len
        return epoch, first, min(first + self._seq_len, int(epoch.ends[-1]))

    def row(self, number: int, sample: int = 0) -> Row:
        """Row `number`, counted over all epochs.

        Args:
            number: of the row.
            sample: the number under which a run takes it; seeds what is rearranged within it.
        """
        epoch, first, last = self._place(number)
        size = last - first
        # One token more at the left: the input before the first label.
        stream = np.full(self._seq_len + 1, self._eos_id, dtype=np.int64)
        position = max(first - 1, 0)
        while position < last:
            place = int(np.searchsorted(epoch.ends, position, side="right"))
            stop = min(int(epoch.ends[place]), last)
            begin = int(epoch.starts[place]) + position - (int(epoch.ends[place - 1]) if place else 0)
            offset = position - first + 1
            stream[offset : offset + stop - position] = epoch.tokens[begin : begin + stop - position]
            position = stop
        if self._fim is not None and self._fim.config.level == "context":
            size = self._fill_in(self._fim, stream, size, sample)
        # An end-of-text opens the segment after it; padding is one segment, opened by the last of them.
        starts = stream[:-1] == self._eos_id
        starts[size + 1 :] = False
        weights = np.zeros(self._seq_len, dtype=np.float32)
        weights[:size] = 1.0
        positions, document_ids = segments(starts)
        return Row(stream[:-1], stream[1:].copy(), weights, positions, document_ids)

    def _fill_in(self, fim: Fim, stream: NDArray[np.int64], size: int, sample: int) -> int:
        """Rearranges the pieces in a row in place; the number of labels that it has then."""
        random = np.random.Generator(np.random.PCG64(derived_seed(self._seed, "fim", sample)))
        tokens, first = fim.row(stream[1 : 1 + size], fim.config.rate_of(self._name), random)
        stream[1 : 1 + len(tokens)] = tokens
        stream[1 + len(tokens) :] = self._eos_id
        if first:
            # A rearranged piece stands alone: what came before it in the document is in no prompt.
            stream[0] = self._eos_id
        return len(tokens)
