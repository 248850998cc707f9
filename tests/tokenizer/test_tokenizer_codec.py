"""The codec: lossless, deaf to special strings in text, the same as other readers of the same files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from hcx.errors import ConfigError, DataError
from hcx.testing.tiny import TINY_TEXT
from hcx.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(TINY_TEXT, 512)

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
text_with_special_strings = st.lists(
    st.one_of(
        any_text, st.sampled_from(SPECIAL_TOKENS), st.sampled_from([*TINY_TEXT, "\r\n", "  ", "\x00", "<|", "|>"])
    ),
    max_size=6,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text_with_special_strings)
def test_every_text_comes_back_and_its_token_bytes_are_its_utf8_form(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(TOKENIZER.token_bytes(i) for i in ids) == text.encode()
    assert not set(ids) & set(TOKENIZER.special_tokens.values())


@settings(max_examples=100, deadline=None)
@given(st.lists(text_with_special_strings, max_size=5))
def test_a_batch_is_encoded_as_its_texts_one_by_one(texts: list[str]) -> None:
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_ids_decode_to_text_as_the_tokenizers_library_decodes_them(ids: list[int]) -> None:
    backend = Backend.from_str(TOKENIZER.tokenizer_json)
    assert TOKENIZER.decode(ids, skip_special=True) == backend.decode(ids, skip_special_tokens=True)


def test_special_strings_become_special_tokens_only_when_allowed() -> None:
    text = f"a{END_OF_TEXT}b"
    assert TOKENIZER.eos_id not in TOKENIZER.encode(text)
    assert TOKENIZER.encode(text, allow_special=True).count(TOKENIZER.eos_id) == 1


def test_the_vocabulary_has_exactly_the_size_asked_for_even_when_text_is_too_short_for_merges() -> None:
    tokenizer = train_tokenizer(["a"], 512)
    assert tokenizer.vocab_size == 512
    assert tokenizer.decode(tokenizer.encode("한국어 abc")) == "한국어 abc"
    assert len(tokenizer.token_bytes(511)) > 0


def test_training_twice_gives_the_same_file() -> None:
    assert train_tokenizer(TINY_TEXT, 512).digest == TOKENIZER.digest


@pytest.mark.parametrize("size", [500, 256, 0])
def test_a_vocabulary_size_that_cannot_be_is_refused_with_the_reason(size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 128"):
        train_tokenizer(TINY_TEXT, size)


def test_saving_and_loading_changes_nothing(tmp_path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest == TOKENIZER.digest
    assert loaded.encode(TINY_TEXT[0]) == TOKENIZER.encode(TINY_TEXT[0])
    assert (loaded.eos_id, loaded.pad_id, loaded.bos_id) == (TOKENIZER.eos_id, TOKENIZER.eos_id, None)
    assert loaded.chat_template == TOKENIZER.chat_template
    assert loaded.special_tokens == TOKENIZER.special_tokens


def test_transformers_reads_the_directory_and_agrees(tmp_path) -> None:
    from transformers import AutoTokenizer

    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert len(theirs) == TOKENIZER.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (TOKENIZER.eos_id, TOKENIZER.pad_id)
    for text in TINY_TEXT:
        ids = theirs.encode(text)
        assert ids == TOKENIZER.encode(text)
        assert theirs.decode(ids) == text
    chat = [
        {"role": "system", "content": "짧게 답하라."},
        {"role": "user", "content": "수도는?"},
        {"role": "assistant", "content": "서울이다."},
        {"role": "user", "content": "Open it."},
    ]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
        assert TOKENIZER.render_chat(chat, prompt) == expected


def test_what_transformers_saves_again_reads_as_the_same_codec(tmp_path) -> None:
    from transformers import AutoTokenizer

    TOKENIZER.save(tmp_path / "a")
    AutoTokenizer.from_pretrained(str(tmp_path / "a"), local_files_only=True).save_pretrained(str(tmp_path / "b"))
    again = Tokenizer.load(tmp_path / "b")
    assert again.encode(TINY_TEXT[0]) == TOKENIZER.encode(TINY_TEXT[0])
    assert again.chat_template == TOKENIZER.chat_template  # newer versions write it to a file of its own
    assert again.eos_id == TOKENIZER.eos_id


def test_a_sentencepiece_like_tokenizer_of_another_maker_is_read(tmp_path) -> None:
    vocab = {"<unk>": 0, "</s>": 1, "<0xEA>": 2, "▁a": 3, "b": 4, "▁": 5, "a": 6}
    backend = Backend(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Prepend("▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == 1
    assert tokenizer.vocab_size == 7
    assert tokenizer.token_bytes(2) == b"\xea"
    assert tokenizer.token_bytes(3) == b" a"
    assert tokenizer.chat_template is None
    with pytest.raises(DataError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_a_directory_without_or_with_a_damaged_tokenizer_says_so(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_lone_surrogates_and_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(DataError, match="outside the vocabulary of 512"):
        TOKENIZER.decode([512])
