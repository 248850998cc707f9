"""Conversations as samples to learn from: ids, and which of them an assistant had to produce.

A sample is the model's chat format as it is served, from position 0 on, with nothing before it. Its labels are the ids
one further on; trained are the assistant's texts and the tokens that close them (HyperCLOVA X report, section on SFT:
the loss is masked everywhere but on the assistant's turns).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hcx.artifacts import digest_bytes
from hcx.data.batch import MicroBatch
from hcx.data.chat_rows import Conversation
from hcx.data.shipped import name_fraction
from hcx.errors import DataError
from hcx.tokenizer import Tokenizer

TooLong = Literal["truncate", "drop"]


@dataclass(frozen=True)
class ChatSamples:
    """Encoded conversations, flat.

    Attributes:
        ids: `[sum of lengths]` int32.
        trained: `[sum of lengths]` bool: this id is a target of the loss.
        starts: `[samples + 1]` int64: sample i is `ids[starts[i]:starts[i + 1]]`.
        sources: the source of each sample.
        fill_id: stands in rows behind a sample's end, with weight 0.
        counts: what became of the conversations read: `kept`, and by reason `truncated`, `too long`, `no answer`.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    starts: NDArray[np.int64]
    sources: tuple[str, ...]
    fill_id: int
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Inputs of each sample: one less than its ids."""
        return np.diff(self.starts) - 1

    @property
    def num_trained(self) -> int:
        """Targets of the loss over all samples."""
        return int(self.trained.sum())

    @property
    def digest(self) -> str:
        """Identity of the samples and their order."""
        hashed = hashlib.sha256()
        for array in (self.ids, self.trained, self.starts):
            hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()

    def micro_batch(self, samples: Sequence[int], rows: int, seq_len: int) -> MicroBatch:
        """Samples as rows, each from position 0; behind a sample's end, and in rows without one, nothing is trained.

        Args:
            samples: numbers, at most `rows`.
            rows, seq_len: shape of the micro-batch; no sample may be longer.

        Returns:
            A micro-batch whose `sample_ids` and `sources` name the rows that hold a sample: the first ones.
        """
        tokens = np.full((rows, seq_len), self.fill_id, dtype=np.int64)
        labels = np.full((rows, seq_len), self.fill_id, dtype=np.int64)
        weights = np.zeros((rows, seq_len), dtype=np.float32)
        for row, sample in enumerate(samples):
            span = slice(int(self.starts[sample]), int(self.starts[sample + 1]))
            ids, size = self.ids[span], span.stop - span.start - 1
            tokens[row, :size], labels[row, :size] = ids[:-1], ids[1:]
            weights[row, :size] = self.trained[span][1:]
        positions = np.broadcast_to(np.arange(seq_len, dtype=np.int64), (rows, seq_len)).copy()
        return MicroBatch(
            # Rows are causal, so what stands behind a sample's end changes nothing before it: no document bounds.
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            positions=torch.from_numpy(positions),
            sample_ids=tuple(int(sample) for sample in samples),
            sources=tuple(self.sources[sample] for sample in samples),
        )


def encode_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    max_tokens: int,
    too_long: TooLong = "truncate",
    every_token: bool = False,
) -> ChatSamples:
    """Encodes conversations in the tokenizer's chat format.

    Args:
        conversations: in order; a turn behind the last answer is left out, as nothing is learned from it.
        tokenizer: of the model.
        max_tokens: inputs of a sample at most (ids less one).
        too_long: `truncate` leaves out the last turns of a longer conversation, whole, down to an answer that fits;
            `drop` leaves it out whole. A conversation whose first answer does not fit is always left out.
        every_token: train every id but the first, users' too.

    Raises:
        DataError: nothing is left, or the tokenizer has no chat format.
    """
    pieces: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.bool_]] = []
    sources: list[str] = []
    counts: Counter[str] = Counter()
    for conversation in conversations:
        counts["read"] += 1
        messages = _answered(conversation.messages)
        if not messages:
            counts["no answer"] += 1
            continue
        try:
            ids, trained = tokenizer.render_training(messages)
            was_long = len(ids) > max_tokens + 1
            while len(ids) > max_tokens + 1 and messages and too_long == "truncate":
                messages = _answered(messages[:-1])
                ids, trained = tokenizer.render_training(messages)
        except DataError as error:
            raise DataError(f"{conversation.place}: {error}") from None
        if len(ids) > max_tokens + 1 or not messages:
            counts["too long"] += 1
            continue
        counts["truncated"] += was_long
        counts["kept"] += 1
        pieces.append(np.asarray(ids, dtype=np.int32))
        mask = np.ones(len(ids), dtype=bool) if every_token else np.asarray(trained, dtype=bool)
        mask[0] = False  # nothing stands before the first id
        masks.append(mask)
        sources.append(conversation.source)
    if not pieces:
        raise DataError(
            f"no conversation is left of {counts['read']}: {counts['no answer']} have no answer, {counts['too long']} "
            f"no first answer within {max_tokens} tokens"
        )
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    told = {reason: counts[reason] for reason in ("read", "kept", "truncated", "too long", "no answer")}
    return ChatSamples(np.concatenate(pieces), np.concatenate(masks), starts, tuple(sources), tokenizer.eos_id, told)


def _answered(messages: Sequence[dict[str, str]]) -> Sequence[dict[str, str]]:
    """The messages up to the last answer that has a text; none if there is no such answer."""
    last = max(
        (n for n, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()),
        default=-1,
    )
    return messages[: last + 1]


def split_held_out(
    conversations: Iterable[Conversation], fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """(to train on, held out). A row's own `split` decides; else the content does, so that equal ones stay together."""
    train: list[Conversation] = []
    held_out: list[Conversation] = []
    for conversation in conversations:
        stated = conversation.split
        if stated is None:
            content = json.dumps(conversation.messages, ensure_ascii=False, sort_keys=True)
            is_held_out = name_fraction(digest_bytes(content.encode("utf-8", "surrogatepass"))) < fraction
        else:
            is_held_out = stated == "validation"
        (held_out if is_held_out else train).append(conversation)
    return train, held_out
