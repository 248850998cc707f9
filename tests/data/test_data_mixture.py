"""Shares by tokens and factors by source, as they are really drawn; and going on after an interruption."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from hcx.data import PackedLoader, ShardSet
from hcx.data.build import build_shards
from hcx.data.recipe import DataRecipe, JsonlSource, LanguageConfig, TrainedTokenizer
from hcx.data.shards import read_megatron
from hcx.errors import ConfigError, DataError, HcxError
from hcx.testing.shards import random_texts, tiny_shards

SEQ = 64
SHARE_TOLERANCE = 0.01
"""The bar: 1 % absolute."""


def built(folder, factors: dict[str, float]) -> ShardSet:
    """Shards of one language with equally large sources."""
    sources = []
    for number, (name, factor) in enumerate(factors.items()):
        rows = [
            {"text": text, "file": f"{name}{n}", "source": name, "split": "train"}
            for n, text in enumerate(random_texts("en", 60, seed=number))
        ]
        rows[0]["split"] = "validation"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(JsonlSource(path=f"{name}.jsonl", upsample=factor))
    recipe = DataRecipe(
        languages={"en": LanguageConfig(share=1, sources=tuple(sources))}, tokenizer=TrainedTokenizer(vocab_size=512)
    )
    return build_shards(recipe, folder / "shards", folder)


@pytest.fixture(scope="module")
def thirds(tmp_path_factory) -> ShardSet:
    return tiny_shards(tmp_path_factory.mktemp("thirds"), documents=400, shares={"ko": 1, "en": 1, "code": 1})


@pytest.fixture(scope="module")
def upsampled(tmp_path_factory) -> ShardSet:
    return built(tmp_path_factory.mktemp("factors"), {"plain": 1.0, "books": 3.0, "chat": 0.5})


def test_thirds_are_thirds_of_the_tokens_within_one_percent(thirds) -> None:
    loader = PackedLoader(thirds, "train", SEQ, seed=7)
    tokens: Counter[str] = Counter()
    for start in range(0, 1500, 50):
        batch = loader.rows(range(start, start + 50))
        for source, weights in zip(batch.sources, batch.weights, strict=True):
            tokens[source] += int(weights.sum())
        if start >= 100:
            for count in tokens.values():
                assert abs(count / sum(tokens.values()) - 1 / 3) < SHARE_TOLERANCE


def test_factors_show_in_what_is_drawn(upsampled) -> None:
    loader = PackedLoader(upsampled, "train", SEQ, seed=7)
    counts = {entry["name"]: entry["tokens"] for entry in upsampled.counts("en")["train"]["sources"]}
    stream = loader._streams["en"]
    epochs = 8
    drawn = loader.draws(range(epochs * stream.rows_per_epoch))["en"]
    longest = int(upsampled.shard("en", "train").lengths.max())
    for name, factor in (("plain", 1), ("books", 3), ("chat", 0.5)):
        # An epoch ends within a row of its plan, and holds at most one document more of a source drawn in part.
        assert abs(drawn[name] / epochs - factor * counts[name]) < 2 * longest + SEQ
    whole = sum(drawn.values())
    planned = counts["plain"] + 3 * counts["books"] + 0.5 * counts["chat"]
    for name, factor in (("plain", 1), ("books", 3), ("chat", 0.5)):
        assert abs(drawn[name] / whole - factor * counts[name] / planned) < SHARE_TOLERANCE


def test_draw_counts_are_those_of_the_rows_themselves(upsampled) -> None:
    """Counted again from the tokens: every document begins with a number of its own in its source."""
    loader = PackedLoader(upsampled, "train", SEQ, seed=7)
    shard = upsampled.shard("en", "train")
    stream = loader._streams["en"]
    for number in range(20):
        expected = []
        for document in stream.documents(number):
            expected.append(set(shard.document(document).tolist()))
        row = stream.row(number)
        labels = row.labels[row.weights > 0]
        assert sum(stream.documents(number).values()) == len(labels)
        assert set(labels.tolist()) <= set().union(*expected)


def test_whole_factors_repeat_every_document_exactly(tmp_path) -> None:
    shards = built(tmp_path, {"a": 1.0, "b": 2.0})
    loader = PackedLoader(shards, "train", SEQ, seed=1)
    stream = loader._streams["en"]
    labels = np.concatenate([row.labels[row.weights > 0] for row in map(stream.row, range(stream.rows_per_epoch))])
    shard = shards.shard("en", "train")
    expected: Counter[int] = Counter()
    for document in range(shard.num_documents):
        for _ in range(2 if shards.sources("en", "train")[int(shard.sources[document])] == "b" else 1):
            expected.update(shard.document(document).tolist())
    assert Counter(labels.tolist()) == expected


def test_a_run_can_choose_other_factors(upsampled) -> None:
    loader = PackedLoader(upsampled, "train", SEQ, seed=7, upsample={"books": 1, "chat": 1})
    drawn = loader.draws(range(loader._streams["en"].rows_per_epoch))["en"]
    assert drawn == {entry["name"]: entry["tokens"] for entry in upsampled.counts("en")["train"]["sources"]}
    with pytest.raises(ConfigError, match=r"upsample\.book: no such source in the shards; did you mean 'books'"):
        PackedLoader(upsampled, "train", SEQ, upsample={"book": 2})
    with pytest.raises(ConfigError, match=r"upsample\.books = 0: must be above 0"):
        PackedLoader(upsampled, "train", SEQ, upsample={"books": 0})


def test_an_interrupted_run_goes_on_with_the_rows_it_would_have_had(upsampled) -> None:
    """In the middle of an epoch, across its end, and after a state went through JSON as in a checkpoint."""
    whole = list(PackedLoader(upsampled, "train", SEQ, seed=3).batches(0, 60, 8, 4, threads=0))
    rows = PackedLoader(upsampled, "train", SEQ, seed=3)._streams["en"].rows_per_epoch
    assert rows < 60 * 8
    for stop in (1, rows // 8, 59):
        first = PackedLoader(upsampled, "train", SEQ, seed=3)
        assert len(list(first.batches(0, stop, 8, 4))) == stop
        state = json.loads(json.dumps(first.state_dict()))
        resumed = PackedLoader(upsampled, "train", SEQ, seed=3)
        resumed.load_state_dict(state)
        assert resumed.next_sample == stop * 8
        for left, right in zip(resumed.batches(stop, 60, 8, 4), whole[stop:], strict=True):
            assert [batch.sample_ids for batch in left] == [batch.sample_ids for batch in right]
            assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(left, right, strict=True))
    with pytest.raises(DataError, match="upsample was"):
        PackedLoader(upsampled, "train", SEQ, seed=3, upsample={"books": 2}).load_state_dict(state)


@pytest.mark.parametrize("name", ["sources", "bytes"])
def test_damage_to_what_lies_beside_the_tokens_is_named(tmp_path, name) -> None:
    shards = tiny_shards(tmp_path, documents=10)
    path = shards.directory / f"ko-train.{name}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(HcxError, match=f"{name}.npy: does not match its digest"):
        shards.verify()
    path.write_bytes(bytes(content[:-3]))
    with pytest.raises(DataError, match=f"{name}.npy"):
        read_megatron(shards.directory / "ko-train")


def test_shards_without_sources_are_read_as_one_source(tmp_path) -> None:
    """Those of an earlier version, and Megatron's own."""
    shards = tiny_shards(tmp_path, documents=20)
    expected = PackedLoader(shards, "train", SEQ, seed=2).rows(range(20))
    for path in shards.directory.glob("*.sources.npy"):
        path.unlink()
    manifest = json.loads((shards.directory / "manifest.json").read_text())
    for language in manifest["counts"]["languages"].values():
        for split in ("train", "validation"):
            del language[split]["sources"]
    (shards.directory / "manifest.json").write_text(json.dumps(manifest))
    old = ShardSet.open(shards.directory)
    assert old.sources("ko", "train") == ("ko",)
    assert torch.equal(PackedLoader(old, "train", SEQ, seed=2).rows(range(20)).tokens, expected.tokens)
