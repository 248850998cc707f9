"""Sources: every kind gives the same documents in the same order, and bad input is answered with its place."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import sys
from pathlib import Path

import pytest

from hcx.config import load_config
from hcx.data.code import licence_of
from hcx.data.recipe import (
    CodeSource,
    DataRecipe,
    DatasetsSource,
    JsonlSource,
    LanguageConfig,
    MegatronSource,
    ParquetSource,
    TableSource,
    TextSource,
    TrainedTokenizer,
)
from hcx.data.sources import read_source, source_files
from hcx.data.texts import read_texts
from hcx.errors import ConfigError, DataError, MissingExtra
from hcx.testing.collection import shared_data
from hcx.testing.shards import tiny_shards

ROWS = [{"text": f"글 {n}", "file": f"f{n}", "licence": "CC0-1.0"} for n in range(7)]


def read(source, folder: Path) -> list[tuple[str, str, str | None, str | None]]:
    return [(d.text, d.name, d.split, d.licence) for d in read_source(source, folder)]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict]) -> None:
    arrow = pytest.importorskip("pyarrow", reason="extra text")
    parquet = pytest.importorskip("pyarrow.parquet", reason="extra text")
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)


def recipe(*sources, **fields) -> DataRecipe:
    return DataRecipe(
        languages={"ko": LanguageConfig(share=1, sources=sources)},
        tokenizer=TrainedTokenizer(vocab_size=384),
        validation_fraction=0.3,
        **fields,
    )


def test_every_kind_of_rows_gives_the_same_documents(tmp_path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress((tmp_path / "a.jsonl").read_bytes()))
    table = "text\tfile\tlicence\n" + "".join("\t".join(row.values()) + "\n" for row in ROWS)
    (tmp_path / "d.tsv.xz").write_bytes(lzma.compress(table.encode()))
    (tmp_path / "e.csv").write_text(table.replace("\t", ","), encoding="utf-8")
    write_parquet(tmp_path / "f.parquet", ROWS)
    expected = [(row["text"], row["file"], None, "CC0-1.0") for row in ROWS]
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz"):
        assert read(JsonlSource(path=name), tmp_path) == expected
    assert read(TableSource(path="d.tsv.xz"), tmp_path) == expected
    assert read(TableSource(path="e.csv", dialect="csv"), tmp_path) == expected
    assert read(ParquetSource(path="f.parquet"), tmp_path) == expected


@pytest.mark.parametrize("builder", ["json", "parquet", "text"])
def test_local_builders_of_the_datasets_library_need_no_network(tmp_path, builder, monkeypatch) -> None:
    pytest.importorskip("datasets", reason="extra text")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows(tmp_path / "a.json", ROWS)
    (tmp_path / "a.text").write_text("".join(row["text"] + "\n" for row in ROWS), encoding="utf-8")
    write_parquet(tmp_path / "a.parquet", ROWS)
    source = DatasetsSource(name=builder, data_files=(f"a.{builder}",))
    assert [text for text, *_ in read(source, tmp_path)] == [row["text"] for row in ROWS]
    assert source_files(source, tmp_path) == [tmp_path / f"a.{builder}"]


def test_a_split_for_testing_is_never_read(tmp_path) -> None:
    with pytest.raises(DataError, match="never trained on"):
        read(DatasetsSource(name="json", load_split="test[:10]"), tmp_path)


def test_a_csv_with_quotes_and_a_tsv_without_them_are_read_by_their_own_rules(tmp_path) -> None:
    (tmp_path / "a.csv").write_text('Q,A\n"말, ""그래""\n두 줄",답\n', encoding="utf-8")
    (tmp_path / "b.tsv").write_text('Q\tA\n"열린 따옴표\t답\n', encoding="utf-8")
    assert read(TableSource(path="a.csv", dialect="csv", field=("Q", "A")), tmp_path)[0][0] == '말, "그래"\n두 줄\n답'
    assert read(TableSource(path="b.tsv", field="Q"), tmp_path)[0][0] == '"열린 따옴표'


def test_rows_are_chosen_joined_and_grouped(tmp_path) -> None:
    rows = [{"film": n // 5, "text": f"평 {n}", "ok": n % 2 == 0} for n in range(20)]
    write_rows(tmp_path / "a.jsonl", rows)
    grouped = read(JsonlSource(path="a.jsonl", group_by="film"), tmp_path)
    assert [text.split("\n") for text, *_ in grouped] == [[f"평 {n}" for n in range(k, k + 5)] for k in (0, 5, 10, 15)]
    # A group that is cut keeps its name: its parts stay on one side of the split.
    cut = read(JsonlSource(path="a.jsonl", group_by="film", group_characters=12), tmp_path)
    assert len(cut) > 4
    assert {name for _, name, *_ in cut} == {name for _, name, *_ in grouped}
    assert all(len(text) <= 12 for text, *_ in cut)
    chosen = read(JsonlSource(path="a.jsonl", where={"ok": True}), tmp_path)
    assert [text for text, *_ in chosen] == [f"평 {n}" for n in range(0, 20, 2)]


def test_rows_go_where_their_split_says_and_test_rows_nowhere(tmp_path) -> None:
    splits = ["train", "dev", "valid", "validation", "test", "prompt", None]
    write_rows(tmp_path / "a.jsonl", [{"text": f"글 {s}", "split": s} for s in splits])
    texts = read_texts(recipe(JsonlSource(path="a.jsonl")), tmp_path)["ko"]
    held_out = {d.text for d in texts.documents["validation"]}
    assert {"글 dev", "글 valid", "글 validation"} <= held_out
    assert "글 train" in {d.text for d in texts.documents["train"]}
    assert texts.dropped["test_split"] == 2
    assert not any("test" in d.text or "prompt" in d.text for both in texts.documents.values() for d in both)


def test_a_tree_of_code_leaves_hidden_and_vendored_files_out_and_knows_its_licences(tmp_path) -> None:
    body = "def f(x):\n    return x\n" * 20
    mit = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"
    files = {
        "proj/a.py": body, "proj/sub/b.py": body + "1", "proj/sub/deep/c.py": body + "2", "proj/.git/x.py": body,
        "proj/vendor/v.py": body, "proj/node_modules/n.py": body, "proj/readme.md": body, "proj/short.py": "x",
        "proj/skipped/s.py": body, "proj/LICENSE": "Apache License\n  Version 2.0, January 2004",
        "proj/sub/LICENSE.txt": mit,
    }  # fmt: skip
    for folder in ("one", "two"):
        names = list(files)
        # The order in which a file system returns names is that of their making, on some.
        random.Random(folder).shuffle(names)
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[name])
    (tmp_path / "one/proj/binary.py").write_bytes(b"\xff\xfe" * 200)
    source = CodeSource(path="proj", skip=("skipped",))
    found = [(d.source, d.name, d.licence) for d in read_source(source, tmp_path / "one")]
    assert found == [(d.source, d.name, d.licence) for d in read_source(source, tmp_path / "two")]
    assert sorted(found, key=lambda item: item[1]) == [
        ("proj (Apache-2.0)", "a.py", "Apache-2.0"),
        ("proj (MIT)", "sub/b.py", "MIT"),
        ("proj (MIT)", "sub/deep/c.py", "MIT"),
    ]
    only = source.model_copy(update={"licences": ("MIT",)})
    assert {d.name for d in read_source(only, tmp_path / "two")} == {"sub/b.py", "sub/deep/c.py"}
    assert licence_of("all rights reserved") == "unknown"


# -- evaluation sets are kept out ------------------------------------------------------------------------------------


def collection(folder: Path) -> None:
    roles = {"train.jsonl": "train", "dev.jsonl": "dev", "test.jsonl": "eval", "mixed.jsonl": "by split field"}
    (folder / "sub").mkdir()
    for name in roles:
        write_rows(folder / "sub" / name, [{"text": f"{name} {n}"} for n in range(4)])
    lines = ["file\trole\tlicence", *(f"sub/{name}\t{role}\tCC0" for name, role in roles.items())]
    (folder / "MANIFEST.tsv").write_text("\n".join(lines) + "\n")


def test_a_collections_roles_hold_whatever_a_recipe_says(tmp_path) -> None:
    collection(tmp_path)
    texts = read_texts(recipe(*(JsonlSource(path=f"sub/{n}.jsonl") for n in ("train", "dev", "mixed"))), tmp_path)["ko"]
    assert {d.text for d in texts.documents["validation"]} >= {f"dev.jsonl {n}" for n in range(4)}
    assert not any("dev" in d.text or "mixed" in d.text for d in texts.documents["train"])
    assert texts.dropped["test_split"] == 4  # rows of a mixed file must say that they are for training
    for kind in (
        JsonlSource(path="sub/test.jsonl"),
        JsonlSource(path="sub/*.jsonl"),
        TextSource(path="sub/test.jsonl"),
    ):
        with pytest.raises(DataError, match=r"test\.jsonl: an evaluation set .* is never trained on"):
            read_texts(recipe(kind), tmp_path)
    write_rows(tmp_path / "sub/new.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="does not list it"):
        read_texts(recipe(JsonlSource(path="sub/new.jsonl")), tmp_path)


def collection_files() -> list[tuple[str, str]]:
    folder = shared_data()
    if folder is None:
        return []
    lines = [line.split("\t") for line in (folder / "MANIFEST.tsv").read_text().splitlines()[1:]]
    return [(cells[0], cells[1]) for cells in lines]


@pytest.mark.skipif(shared_data() is None, reason="no collection of data sets: set HCX_SHARED_DATA")
def test_no_evaluation_file_of_the_collection_can_be_a_source() -> None:
    folder = shared_data()
    assert folder is not None
    evaluation = [name for name, role in collection_files() if role == "eval"]
    # What its README lists under "Never train on", by folder and by file.
    for pattern in ("klue/", "bbq/", "bbh/", "ifeval/", "ntrex/", "human_eval_infilling/", "ud_korean_", "hh_rlhf/"):
        assert all(name in evaluation for name, _ in collection_files() if name.startswith(pattern))
    assert {"gsm8k/test.rows0-659.jsonl", "nsmc/reviews.test.tsv.xz", "sgd/test.jsonl.xz"} <= set(evaluation)
    for name in evaluation:
        source = TableSource(path=name) if ".tsv" in name else JsonlSource(path=name)
        with pytest.raises(DataError, match="never trained on"):
            list(read_source(source, folder))


@pytest.mark.skipif(shared_data() is None, reason="no collection of data sets: set HCX_SHARED_DATA")
def test_the_recipe_for_the_collection_names_training_files_only() -> None:
    from hcx.artifacts import find_resource

    config = load_config(DataRecipe, find_resource("launch/data/shared.yaml"))
    folder = shared_data()
    assert folder is not None
    roles = dict(collection_files())
    named = set()
    for language in config.languages.values():
        for source in language.sources:
            for path in source_files(source, folder):
                named.add(roles[path.relative_to(folder).as_posix()])
            # The first documents show that fields and columns are right.
            documents = [document for document, _ in zip(read_source(source, folder), range(5), strict=False)]
            assert documents
            assert all(document.text.strip() for document in documents)
    assert named == {"train", "dev", "by split field"}


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        ("a.jsonl", b"", JsonlSource(path="a.jsonl"), "no training document is left"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "cut in the mi', JsonlSource(path="a.jsonl"), "line 2: .*interrupted"),
        ("a.jsonl", b'["x"]\n', JsonlSource(path="a.jsonl"), "not a JSON object but list"),
        ("a.jsonl", b'{"text": "\xed\x95"}\n', JsonlSource(path="a.jsonl"), "line 1: not JSON lines in UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 50)[:-20], JsonlSource(path="a.jsonl.gz"), "not JSON lines"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n')[:-9], JsonlSource(path="a.jsonl.xz"), "not JSON lines"),
        ("a.jsonl.xz", b"plain", JsonlSource(path="a.jsonl.xz"), "not JSON lines"),
        ("a.txt", b"\xff\xfe", TextSource(path="a.txt"), "not UTF-8 text"),
        ("a.tsv", b"text\tn\nx\t1\ny\n", TableSource(path="a.tsv"), "line 3: 1 cells, the headings are 2"),
        ("a.tsv", b"txt\tn\nx\t1\n", TableSource(path="a.tsv"), "line 2: no text under the key 'text'.*n, txt"),
        ("a.csv", b'text\n"open', TableSource(path="a.csv", dialect="csv"), "line 2: not CSV"),
        ("a.parquet", b"PAR1 not really", ParquetSource(path="a.parquet"), "not a Parquet file"),
        ("a.jsonl", b'{"text": "x"}\n', JsonlSource(path="a.jsonl", group_by="film"), "no key 'film' to group by"),
        ("a/b.md", b"x", CodeSource(path="a"), "no file ends with .py"),
        ("a.txt", b"x", CodeSource(path="b"), "no such folder"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_its_place(tmp_path, name, content, source, message) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(recipe(source), tmp_path)


def test_a_parquet_file_without_the_column_is_answered_with_those_it_has(tmp_path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"content": "x", "id": 1}])
    with pytest.raises(DataError, match=r"no column 'text'; .*valid: content, id"):
        read(ParquetSource(path="a.parquet"), tmp_path)
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged[-12:-4] = b"\x00" * 8
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.parquet: .*damaged"):
        read(ParquetSource(path="a.parquet"), tmp_path)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_truncated_megatron_pair_is_refused_before_anything_is_read(tmp_path, ending) -> None:
    shards = tiny_shards(tmp_path, documents=10)
    path = shards.directory / f"ko-train{ending}"
    path.write_bytes(path.read_bytes()[:-6])
    source = MegatronSource(path=str(shards.directory / "ko-train"), tokenizer=str(shards.directory / "tokenizer"))
    with pytest.raises(DataError, match=f"ko-train{ending}: .*damaged"):
        read(source, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=f"ko-train{ending}: missing"):
        read(source, tmp_path)


@pytest.mark.parametrize(
    ("module", "source"),
    [("pyarrow", ParquetSource(path="a")), ("datasets", DatasetsSource(name="json", data_files=("a",)))],
)
def test_a_missing_library_is_asked_for_by_its_extra(tmp_path, monkeypatch, module, source) -> None:
    (tmp_path / "a").write_text("x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"pip install 'hcx-llm\[text\]'"):
        read(source, tmp_path)


def test_mistakes_in_a_recipe_are_answered(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    for text, message in (
        ("{kind: jsonl, path: a, upsample: 0}", "upsample"),
        ("{kind: jsonl, path: a, group: b}", "unknown key"),
        ("{kind: parket, path: a}", "kind"),
    ):
        path.write_text(f"languages:\n  ko: {{share: 1, sources: [{text}]}}\n")
        with pytest.raises(ConfigError, match=message):
            load_config(DataRecipe, path)
