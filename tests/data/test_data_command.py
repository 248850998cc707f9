"""`hcx data` and `hcx tokenizer` as a user types them."""

from __future__ import annotations

import json

import pytest

from hcx.cli.main import main
from hcx.testing.shards import tiny_shards


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_build_report_and_tokenizer_train_work_from_yaml(tmp_path, capsys) -> None:
    tiny_shards(tmp_path)  # writes the JSON lines too
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "languages:\n  ko: {share: 3, sources: [{kind: jsonl, path: ko.jsonl}]}\n"
        "  en: {share: 1, sources: [{kind: jsonl, path: en.jsonl}]}\n"
        "tokenizer: {kind: train, vocab_size: 512}\nvalidation_fraction: 0.2\n"
    )
    code, out, _ = run(capsys, "data", "build", recipe, "tokenizer.vocab_size=384", "--out", tmp_path / "s", "--json")
    assert code == 0
    built = json.loads(out)
    assert built["shares"] == {"ko": 0.75, "en": 0.25}
    assert built["vocab_size"] == 384
    code, out, _ = run(capsys, "data", "report", tmp_path / "s", "--verify", "--baseline")
    assert code == 0
    assert "75.0%" in out
    assert "trigram" in out
    (tmp_path / "t.yaml").write_text("vocab_size: 384\ndata: r.yaml\n")
    code, _, _ = run(capsys, "tokenizer", "train", tmp_path / "t.yaml", "--out", tmp_path / "tok")
    assert code == 0
    # The same text and size as the shards' own tokenizer.
    same = (tmp_path / "s/tokenizer/tokenizer.json").read_bytes()
    assert (tmp_path / "tok/tokenizer.json").read_bytes() == same
    code, out, _ = run(capsys, "tokenizer", "report", tmp_path / "tok", "--text", tmp_path / "ko.jsonl", "--json")
    assert code == 0
    assert json.loads(out)[0]["lossless"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "fetch", "embeded"], "did you mean 'embedded'"),
        (["data", "report", "/nowhere"], "no such directory"),
        (["data", "build", "launch/data/dem.yaml"], "did you mean 'launch/data/demo.yaml'"),
        (["data", "build", "launch/data/demo.yaml", "languages.ko.shares=1"], "did you mean 'share'"),
        (["tokenizer", "report", "/nowhere", "--text", __file__], r"no tokenizer.json"),
    ],
)
def test_mistakes_are_answered_with_a_message_and_exit_code_2(
    tmp_path, capsys, monkeypatch, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert message in error
    assert "Traceback" not in error


def test_the_report_tells_sources_stages_and_evaluation_items(tmp_path, capsys) -> None:
    item = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    rows = [{"text": f"document {n} to a@b.com", "source": "mail", "split": "train"} for n in range(9)]
    rows += [{"text": f"{item} {n}", "split": "train"} for n in range(2)]
    rows += [{"text": "held out", "split": "dev"}, {"text": "for the test", "split": "test"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "items.jsonl").write_text(json.dumps({"q": item}) + "\n")
    (tmp_path / "r.yaml").write_text(
        "languages:\n  en: {share: 1, sources: [{kind: jsonl, path: x.jsonl, upsample: 2}]}\n"
        "filters:\n  pii: {}\n  decontaminate: {against: [{kind: file, name: mine, path: items.jsonl, fields: [q]}]}\n"
        "tokenizer: {kind: train, vocab_size: 384}\n"
    )
    code, out, _ = run(capsys, "data", "build", tmp_path / "r.yaml", "--out", tmp_path / "s")
    assert code == 0
    assert "mine: 1 of 1 evaluation items found, in 2 training documents" in out
    assert "en pii: 12 documents, 12 kept, 9 changed, 9 email" in out
    assert "en read: 13 documents, 12 kept, 1 test_split" in out
    assert "en decontaminate: 11 documents, 9 kept, 2 contaminated" in out
    assert "mail" in out
    code, out, _ = run(capsys, "data", "report", tmp_path / "s", "--json")
    counts = json.loads(out)["languages"]["en"]
    assert counts["stages"]["decontaminate"]["dropped"] == {"contaminated": 2}
    assert counts["train"]["sources"][0]["upsample"] == 2


def test_a_flipped_byte_and_an_empty_corpus_end_with_exit_code_2_and_the_file(tmp_path, capsys) -> None:
    shards = tiny_shards(tmp_path, documents=10)
    path = shards.directory / "en-train.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 0xFF
    path.write_bytes(content)
    code, _, error = run(capsys, "data", "report", shards.directory, "--verify")
    assert code == 2
    assert f"{path}: does not match its digest" in error
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "r.yaml").write_text("languages:\n  ko: {share: 1, sources: [{kind: jsonl, path: empty.jsonl}]}\n")
    code, _, error = run(capsys, "data", "build", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert code == 2
    assert "languages.ko: no training document is left (the sources are empty)" in error
    assert not (tmp_path / "out").exists()
