"""Embeddings in clusters by frequency."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from hcx.compress import CompressPlan, ModulePlan, compress_model, quantize
from hcx.compress.clusters import (
    Clusters,
    average_bits,
    cluster_sizes,
    frequency_order,
    mixed_frequencies,
    quantize_clustered,
    token_counts,
)
from hcx.data import ShardSet
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight
from hcx.model.load import ModelFiles, iter_tensors
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_model_directory


@pytest.mark.parametrize(
    ("ratio", "vocab", "expected"),
    [(1, 15_000, "2.500"), (2, 15_000, "1.733"), (4, 85_000, "1.318"), (8, 585_000, "1.142")],
)
def test_the_paper_s_averages_come_out_exactly(ratio: int, vocab: int, expected: str) -> None:
    assert f"{float(average_bits(4, ratio)):.3f}" == expected
    sizes = cluster_sizes(vocab, 4, ratio)
    assert sum(sizes) == vocab
    assert sizes == sorted(sizes)
    assert Fraction(sum(size * (4 - i) for i, size in enumerate(sizes)), vocab) == average_bits(4, ratio)


def test_sizes_are_those_of_the_specification_and_take_every_row() -> None:
    assert cluster_sizes(1500, 4, 2) == [100, 200, 400, 800]
    assert [average_bits(4, r) for r in (2, 4, 8)] == [Fraction(26, 15), Fraction(112, 85), Fraction(668, 585)]
    for vocab in (49_152, 100_003, 16):
        sizes = cluster_sizes(vocab, 4, 2)
        assert sum(sizes) == vocab
        assert sizes == sorted(sizes)
    with pytest.raises(ConfigError, match="14 rows are too few for 4 clusters that grow by 2"):
        cluster_sizes(14, 4, 2)


def test_a_language_s_volume_does_not_decide_and_pinned_rows_come_first() -> None:
    counts = {"en": np.array([900, 90, 9, 0, 0]) * 1000, "ko": np.array([0, 0, 1, 6, 3])}
    equal = frequency_order(mixed_frequencies(counts)).tolist()
    assert equal[:2] == [0, 3]  # the commonest of each
    english = frequency_order(mixed_frequencies(counts, {"en": 1.0})).tolist()
    assert english == [0, 1, 2, 3, 4]
    assert frequency_order(mixed_frequencies(counts), [4]).tolist()[0] == 4
    with pytest.raises(ConfigError, match=r"shares\.jp: no such language; there are en, ko"):
        mixed_frequencies(counts, {"jp": 1.0})


def test_frequent_rows_get_more_planes_and_a_smaller_error() -> None:
    weight = torch.randn(150, 64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1)).int()

    def codes(rows: torch.Tensor, bits: int) -> PackedWeight:
        return quantize(rows, bits, 64)

    clustered = quantize_clustered(weight, order, 4, 2, codes)
    assert [(s.out_features, s.bits) for s in clustered.segments] == [(10, 4), (20, 3), (40, 2), (80, 1)]
    assert clustered.code_bits == pytest.approx(26 / 15)
    dense, start = clustered.dequantize(), 0
    for segment in clustered.segments:  # each cluster as if it were a weight of its own
        rows = order[start : start + segment.out_features].long()
        assert torch.equal(dense[rows], quantize(weight[rows], segment.bits, 64).dequantize())
        start += segment.out_features


def test_a_plan_clusters_the_embedding_by_the_training_text(tmp_path: Path) -> None:
    model = tiny_model_directory(tmp_path / "full", with_tokenizer=False)
    shards = tiny_shards(tmp_path, documents=20, vocab_size=384)
    counts = token_counts(shards, "ko", 384)
    by_hand = np.concatenate(
        [shards.shard("ko", "train").document(i) for i in range(shards.shard("ko", "train").num_documents)]
    )
    assert counts.sum() == len(by_hand)
    assert counts[by_hand[0]] == (by_hand == by_hand[0]).sum()
    clusters = Clusters(shards=str(tmp_path / "shards"), shares={"ko": 0.7, "en": 0.3}, pinned=(5,))
    plan = CompressPlan(embedding=ModulePlan(bits=4, group_size=64, clusters=clusters))
    summary = compress_model(model, tmp_path / "bcq", plan)
    embedding = next(module for module in summary.modules if module.stem == "model.embed_tokens")
    # 26/15 planes and as many fp16 scales per 64 inputs, and 32 bits of row order.
    assert embedding.bits_per_weight == pytest.approx(26 / 15 * (1 + 16 / 64) + 32 / 64, abs=0.02)
    full, read = dict(iter_tensors(model)), dict(iter_tensors(tmp_path / "bcq"))
    order = clusters.order(384).long()
    assert int(order[0]) == 5
    lost = (full["model.embed_tokens.weight"] - read["model.embed_tokens.weight"]).norm(dim=1)
    assert float(lost[order[:25]].mean()) < 0.5 * float(lost[order[-200:]].mean())
    with ModelFiles(tmp_path / "bcq") as files:
        assert [run["bits"] for run in files.modules["model.embed_tokens"]["row_segments"]] == [4, 3, 2, 1]


def test_clusters_of_anything_but_tokens_and_foreign_vocabularies_are_refused(tmp_path: Path) -> None:
    tiny_shards(tmp_path, documents=12, vocab_size=384)
    with pytest.raises(ValueError, match="only embedding and output have rows that are tokens"):
        CompressPlan(default=ModulePlan(clusters=Clusters(shards="x")))
    own = Clusters(shards=str(tmp_path / "shards"))
    with pytest.raises(ConfigError, match="the weight has 100 rows"):
        own.order(100)
    with pytest.raises(ConfigError, match="ids from 0 to 383"):
        own.model_copy(update={"pinned": (384,)}).order(384)
    assert ShardSet.open(tmp_path / "shards").vocab_size <= 384
