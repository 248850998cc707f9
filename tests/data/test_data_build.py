"""Text to shards: division by file, de-duplication, the same bytes each time, damage found."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from hcx.artifacts import find_resource, resource_names
from hcx.config import load_config
from hcx.data import DataRecipe, ShardSet
from hcx.data.build import build_shards, read_texts
from hcx.data.recipe import ExistingTokenizer, JsonlSource, LanguageConfig, MegatronSource, TextSource, TrainedTokenizer
from hcx.data.shards import read_megatron, write_megatron
from hcx.errors import DataError, HcxError
from hcx.testing.shards import random_texts, tiny_shards
from hcx.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return tiny_shards(tmp_path_factory.mktemp("built"))


def recipe(**languages: LanguageConfig) -> DataRecipe:
    return DataRecipe(languages=languages, tokenizer=TrainedTokenizer(vocab_size=384), validation_fraction=0.3)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_every_document_is_in_the_shards_once_and_ends_with_end_of_text(shards) -> None:
    found = []
    for split in ("train", "validation"):
        shard = shards.shard("ko", split)
        for number in range(shard.num_documents):
            tokens = shard.document(number).tolist()
            assert tokens[-1] == shards.eos_id
            assert shards.eos_id not in tokens[:-1]
            text = shards.tokenizer.decode(tokens[:-1])
            assert len(text.encode()) == shard.document_bytes[number]
            found.append(text)
    assert sorted(found) == sorted(random_texts("ko", 40))


def test_the_same_recipe_gives_the_same_bytes(shards, tmp_path) -> None:
    again = tiny_shards(tmp_path)
    assert again.manifest.files == shards.manifest.files


def test_manifest_counts_are_those_of_the_files(shards) -> None:
    for language in shards.languages:
        for split in ("train", "validation"):
            shard, counts = shards.shard(language, split), shards.counts(language)[split]
            assert counts["documents"] == shard.num_documents
            assert counts["tokens"] == len(shard.tokens) == shard.lengths.sum()
            assert counts["bytes"] == shard.document_bytes.sum()
    assert sum(shards.shares.values()) == pytest.approx(1)
    assert shards.tokenizer.digest == shards.tokenizer_digest


@pytest.mark.parametrize(
    "name", ["ko-train.bin", "en-validation.idx", "code-train.bytes.npy", "tokenizer/tokenizer.json"]
)
def test_one_flipped_bit_is_found_and_the_file_named(tmp_path, name) -> None:
    shards = tiny_shards(tmp_path, documents=10)
    shards.verify()
    path = shards.directory / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(HcxError, match=name):
        shards.verify()


def test_an_interrupted_build_is_not_a_shard_directory(tmp_path) -> None:
    (tmp_path / "ko-train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="hcx data build"):
        ShardSet.open(tmp_path)


def test_equal_documents_are_kept_once_and_never_in_both_splits(tmp_path) -> None:
    text = "the very same text"
    rows = [
        {"text": text, "file": "a", "split": "train"},
        {"text": "  the very\nsame   text ", "file": "b", "split": "validation"},
        {"text": "another", "file": "c", "split": "train"},
        {"text": "another", "file": "d", "split": "train"},
    ]
    write_rows(tmp_path / "x.jsonl", rows)
    write_rows(tmp_path / "y.jsonl", [{"text": "another", "split": "train"}, {"text": "third", "split": "train"}])
    texts = read_texts(
        recipe(
            en=LanguageConfig(share=1, sources=(JsonlSource(path="x.jsonl"),)),
            ko=LanguageConfig(share=1, sources=(JsonlSource(path="y.jsonl"),)),
        ),
        tmp_path,
    )
    assert [d.name for d in texts["en"].documents["validation"]] == ["b"]
    assert [d.text for d in texts["en"].documents["train"]] == ["another"]
    assert [d.text for d in texts["ko"].documents["train"]] == ["third"]
    assert (texts["en"].dropped["duplicate"], texts["ko"].dropped["duplicate"]) == (2, 1)


def test_all_documents_of_a_file_go_to_one_split(tmp_path) -> None:
    write_rows(tmp_path / "x.jsonl", [{"text": f"{f} {n}", "file": str(f)} for f in range(40) for n in range(3)])
    texts = read_texts(recipe(en=LanguageConfig(share=1, sources=(JsonlSource(path="x.jsonl"),))), tmp_path)["en"]
    names = {split: {d.name for d in documents} for split, documents in texts.documents.items()}
    assert names["train"]
    assert names["validation"]
    assert not names["train"] & names["validation"]


def test_a_byte_budget_bounds_training_text_and_counts_what_it_left_out(tmp_path) -> None:
    write_rows(tmp_path / "x.jsonl", [{"text": f"{n:04d}" + "x" * 96, "file": str(n)} for n in range(100)])
    source = JsonlSource(path="x.jsonl", max_bytes=2000)
    texts = read_texts(recipe(en=LanguageConfig(share=1, sources=(source,))), tmp_path)["en"]
    assert len(texts.documents["train"]) == 20
    assert len(texts.documents["validation"]) == 6
    assert texts.dropped["over_budget"] == 74


def test_text_files_and_compressed_json_lines_are_read(tmp_path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"문서 {number}", encoding="utf-8")
    with gzip.open(tmp_path / "z.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"content": f"doc {n}"}) + "\n" for n in range(8))
    sources = (TextSource(path="*.txt"), JsonlSource(path="z.jsonl.gz", field="content"))
    texts = read_texts(recipe(mixed=LanguageConfig(share=1, sources=sources)), tmp_path)["mixed"]
    found = sorted(d.text for documents in texts.documents.values() for d in documents)
    assert found == sorted([f"문서 {n}" for n in range(8)] + [f"doc {n}" for n in range(8)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"txt": "b"}\n', "line 2: no text under the key 'text'"),
        (b'{"text": "a"}\nnot json\n', "not JSON lines"),
        (b'{"text": "\xff"}\n', "not JSON lines in UTF-8"),
        (b'{"text": "a\\ud800"}\n', "lone surrogate at character 1"),
    ],
)
def test_damaged_json_lines_name_file_and_line(tmp_path, content, message) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(recipe(en=LanguageConfig(share=1, sources=(JsonlSource(path="x.jsonl"),))), tmp_path)


def test_a_source_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match="nothing-here"):
        read_texts(recipe(en=LanguageConfig(share=1, sources=(TextSource(path="nothing-here/*"),))), tmp_path)


def test_an_existing_tokenizer_is_used_and_recorded(shards, tmp_path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"open the file {number}", encoding="utf-8")
    config = DataRecipe(
        languages={"en": LanguageConfig(share=1, sources=(TextSource(path="*.txt"),))},
        tokenizer=ExistingTokenizer(path=str(shards.directory / "tokenizer")),
        validation_fraction=0.3,
    )
    built = build_shards(config, tmp_path / "out", tmp_path)
    assert built.tokenizer_digest == shards.tokenizer_digest
    roles = [entry.role for entry in built.manifest.inputs]
    assert roles.count("text") == 20
    assert roles.count("tokenizer") == 1


def test_megatron_pairs_made_elsewhere_are_a_source_of_text(shards, tmp_path) -> None:
    source = MegatronSource(path=str(shards.directory / "ko-train"), tokenizer=str(shards.directory / "tokenizer"))
    config = recipe(ko=LanguageConfig(share=1, sources=(source,)))
    texts = read_texts(config, tmp_path)["ko"]
    found = sorted(d.text for documents in texts.documents.values() for d in documents)
    shard = shards.shard("ko", "train")
    expected = [shards.tokenizer.decode(shard.document(n)[:-1].tolist()) for n in range(shard.num_documents)]
    assert found == sorted(expected)
    train_tokenizer(["x"], 384).save(tmp_path / "small")
    with pytest.raises(DataError, match="has 384; name the tokenizer"):
        read_texts(
            recipe(ko=LanguageConfig(share=1, sources=(source.model_copy(update={"tokenizer": "small"}),))), tmp_path
        )


def test_the_index_is_megatrons_byte_for_byte(tmp_path) -> None:
    """The worked example of Megatron-LM's layout: magic, version, type code, counts, sizes, pointers, bounds."""
    write_megatron(tmp_path / "x", [np.array([1, 2, 3]), np.array([4])], np.uint16)
    assert (tmp_path / "x.bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 4, 0])
    expected = (
        b"MMIDIDX\x00\x00"
        + (1).to_bytes(8, "little")
        + bytes([8])
        + (2).to_bytes(8, "little")
        + (3).to_bytes(8, "little")
        + b"".join(n.to_bytes(4, "little") for n in (3, 1))
        + b"".join(n.to_bytes(8, "little") for n in (0, 6))
        + b"".join(n.to_bytes(8, "little") for n in (0, 1, 2))
    )
    assert (tmp_path / "x.idx").read_bytes() == expected


def test_megatron_core_reads_our_shards(shards) -> None:
    dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDataset(
        str(shards.directory / "ko-train")
    )
    shard = shards.shard("ko", "train")
    assert len(dataset) == shard.num_documents
    for number in range(len(dataset)):
        assert np.array_equal(dataset[number], shard.document(number))


def test_a_truncated_token_file_is_found_when_opened(tmp_path) -> None:
    write_megatron(tmp_path / "x", [np.array([1, 2, 3])], np.int32)
    (tmp_path / "x.bin").write_bytes(b"\x00" * 8)
    with pytest.raises(DataError, match="8 bytes, the index says 12"):
        read_megatron(tmp_path / "x")


@pytest.mark.parametrize("name", resource_names("launch/data"))
def test_every_shipped_data_recipe_loads(name: str) -> None:
    assert load_config(DataRecipe, find_resource(name)).languages
