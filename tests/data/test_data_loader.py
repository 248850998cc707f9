"""The loader: an order that depends on the seed alone, every token once per epoch, documents apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch

from hcx.data import MicroBatch, PackedLoader, ShardSet, validation_batches, validation_bytes
from hcx.data.mixture import Mixture
from hcx.errors import ConfigError, DataError
from hcx.testing.shards import tiny_shards

SEQ = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def assert_equal(left: MicroBatch, right: MicroBatch) -> None:
    for field in fields(MicroBatch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def joined(batches: list[MicroBatch]) -> MicroBatch:
    return MicroBatch(
        **{
            name: torch.cat([getattr(batch, name) for batch in batches])
            for name in ("tokens", "labels", "weights", "positions", "document_ids")
        },
        sample_ids=tuple(i for batch in batches for i in batch.sample_ids),
        sources=tuple(s for batch in batches for s in batch.sources),
    )


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_step_has_the_same_samples_for_every_number_of_ranks_and_micro_batch_size(
    shards, dp_size, micro_batch
) -> None:
    loader = PackedLoader(shards, "train", SEQ, seed=3)
    expected = loader.rows(range(5 * 12, 6 * 12))
    ranks = [loader.step_batch(5, 12, micro_batch, rank, dp_size) for rank in range(dp_size)]
    assert all(len(batch.tokens) == micro_batch for rank in ranks for batch in rank)
    assert_equal(joined([batch for rank in ranks for batch in rank]), expected)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetching_threads_change_nothing(shards, threads) -> None:
    loader = PackedLoader(shards, "train", SEQ, seed=3)
    expected = [loader.step_batch(step, 6, 3, 1, 2, first_sample=4) for step in range(2, 9)]
    found = list(loader.batches(2, 9, 6, 3, 1, 2, first_sample=4, threads=threads))
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert_equal(joined(left), joined(right))
    assert loader.next_sample == 4 + 9 * 6


def test_samples_do_not_depend_on_what_was_read_before(shards) -> None:
    loader = PackedLoader(shards, "train", SEQ, seed=3)
    forwards = [loader.rows([i]) for i in range(200)]
    fresh = PackedLoader(shards, "train", SEQ, seed=3)
    for i in reversed(range(200)):
        assert_equal(fresh.rows([i]), forwards[i])


def test_another_seed_gives_another_order(shards) -> None:
    left = PackedLoader(shards, "train", SEQ, seed=3).rows(range(8))
    assert not torch.equal(left.tokens, PackedLoader(shards, "train", SEQ, seed=4).rows(range(8)).tokens)


@pytest.mark.parametrize("seq_len", [7, 32, 100_000])
def test_every_token_of_every_document_is_a_label_once_per_epoch_and_epochs_differ(shards, seq_len) -> None:
    loader = PackedLoader(shards, "train", seq_len, seed=1, shares={"ko": 1.0})
    rows = loader._streams["ko"].rows_per_epoch
    expected = Counter(np.asarray(shards.shard("ko", "train").tokens).tolist())
    epochs = [loader.rows(range(epoch * rows, (epoch + 1) * rows)) for epoch in range(2)]
    for epoch in epochs:
        assert Counter(epoch.labels[epoch.weights > 0].tolist()) == expected
    assert not torch.equal(epochs[0].tokens, epochs[1].tokens)
    assert loader.epochs(2 * rows) == {"ko": 2.0}


def test_documents_are_segments_that_end_of_text_opens(shards) -> None:
    """Follows every row token by token: each segment must be a piece of one document."""
    shard = shards.shard("ko", "train")
    eos = shards.eos_id
    documents = {tuple(shard.document(n).tolist()) for n in range(shard.num_documents)}
    loader = PackedLoader(shards, "train", 4096, seed=1, shares={"ko": 1.0})
    batch = loader.rows([0])
    tokens, labels, positions, ids = (
        getattr(batch, name)[0].tolist() for name in ("tokens", "labels", "positions", "document_ids")
    )
    weights = batch.weights[0].tolist()
    whole = 0
    for number in range(max(ids) + 1):
        where = [i for i, d in enumerate(ids) if d == number]
        assert where == list(range(where[0], where[-1] + 1))
        assert [positions[i] for i in where] == list(range(len(where)))
        assert tokens[where[0]] == eos
        counted = tuple(labels[i] for i in where if weights[i])
        if counted and counted[-1] == eos:
            # Nothing but end-of-text stands before the first token, and end-of-text is the last label.
            assert counted in documents
            assert [tokens[i] for i in where if weights[i]] == [eos, *counted[:-1]]
            whole += 1
    assert whole > 10


def test_labels_follow_inputs_within_a_row(shards) -> None:
    batch = PackedLoader(shards, "train", SEQ, seed=1).rows(range(300))
    follows = batch.tokens[:, 1:] == batch.labels[:, :-1]
    assert bool(follows[batch.weights[:, 1:] > 0].all())


def test_languages_keep_to_their_shares_at_every_length() -> None:
    shares = {"ko": 0.5, "en": 0.3, "code": 0.2}
    mixture = Mixture(shares)
    seen: Counter[str] = Counter()
    for number in range(2500):
        name, before = mixture.row(number)
        assert before == seen[name]
        seen[name] += 1
        for language, share in shares.items():
            assert abs(seen[language] - share * (number + 1)) < len(shares)
    assert mixture.counts(2500) == dict(seen)


def test_shares_can_be_given_and_left_out_languages_do_not_occur(shards) -> None:
    loader = PackedLoader(shards, "train", SEQ, seed=1, shares={"ko": 3, "code": 1})
    assert Counter(loader.rows(range(40)).sources) == {"ko": 30, "code": 10}
    with pytest.raises(ConfigError, match="did you mean 'ko'"):
        PackedLoader(shards, "train", SEQ, seed=1, shares={"kor": 1})
    with pytest.raises(ConfigError, match="not all of them 0"):
        PackedLoader(shards, "train", SEQ, seed=1, shares={"ko": 0})


def test_the_shard_recipes_shares_are_the_default(shards) -> None:
    counts = Counter(PackedLoader(shards, "train", SEQ, seed=1).rows(range(100)).sources)
    assert counts == {"ko": 50, "en": 30, "code": 20}


def test_state_goes_on_only_with_the_same_data_and_settings(shards) -> None:
    loader = PackedLoader(shards, "train", SEQ, seed=1)
    loader.step_batch(6, 4, 2)
    state = loader.state_dict()
    other = PackedLoader(shards, "train", SEQ, seed=1)
    other.load_state_dict(state)
    assert other.next_sample == 28
    with pytest.raises(DataError, match="seq_len was 32, now 16"):
        PackedLoader(shards, "train", 16, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 1, now 2"):
        PackedLoader(shards, "train", SEQ, seed=2).load_state_dict(state)


def test_batch_sizes_that_do_not_divide_are_refused(shards) -> None:
    with pytest.raises(ConfigError, match="global_batch = 10 is not a multiple of micro_batch = 2 times 3"):
        PackedLoader(shards, "train", SEQ, seed=1).step_batch(0, 10, 2, 0, 3)
    with pytest.raises(ConfigError, match="dp_rank = 2"):
        PackedLoader(shards, "train", SEQ, seed=1).step_batch(0, 8, 2, 2, 2)


@pytest.mark.parametrize("seq_len", [16, 64, 1000])
def test_validation_scores_every_token_of_every_held_out_document_once(shards, seq_len) -> None:
    shard = shards.shard("en", "validation")
    batches = list(validation_batches(shards, "en", seq_len, 3))
    labels = [int(t) for b in batches for t in b.labels[b.weights > 0]]
    assert labels == np.asarray(shard.tokens).tolist()
    assert all(len(batch.tokens) <= 3 and batch.tokens.shape[1] == seq_len for batch in batches)
    assert validation_bytes(shards, "en") == shards.counts("en")["validation"]["bytes"]


def test_held_out_documents_in_one_row_do_not_see_each_other(shards) -> None:
    batch = next(validation_batches(shards, "en", 1000, 1))
    ids, positions, tokens = batch.document_ids[0], batch.positions[0], batch.tokens[0]
    starts = torch.cat([torch.tensor([True]), ids[1:] != ids[:-1]])
    assert int(starts.sum()) > 2
    assert torch.equal(positions == 0, starts)
    assert bool((tokens[starts] == shards.eos_id).all())


def test_a_limit_takes_the_first_documents_and_their_bytes(shards) -> None:
    shard = shards.shard("en", "validation")
    batches = list(validation_batches(shards, "en", 64, 4, limit=2))
    assert sum(float(b.weights.sum()) for b in batches) == shard.lengths[:2].sum()
    assert validation_bytes(shards, "en", 2) == shard.document_bytes[:2].sum()
