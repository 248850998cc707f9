"""Streams of text out of tokens that split characters."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcx.generate import Detokenizer
from hcx.testing.tiny import TINY_TEXT
from hcx.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TINY_TEXT, vocab_size=384)


def _pieces(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str, str | None]:
    stream = Detokenizer(tokenizer).stream(stop)
    pieces = [stream.push(token) for token in tokens]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces, stream.text, stream.stopped


def test_a_syllable_split_over_tokens_is_emitted_whole_or_not_at_all(tokenizer: Tokenizer) -> None:
    text = "뷁쀍 한글 😀 끝"
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text), "the text should split into bytes"
    pieces, whole, _ = _pieces(tokenizer, tokens)
    assert whole == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_decomposed_jamo_wait_for_the_rest_of_their_syllable(tokenizer: Tokenizer) -> None:
    text = "\u1112\u1161\u11ab\u1100\u1173\u11af."  # two syllables as conjoining jamo
    pieces, whole, _ = _pieces(tokenizer, tokenizer.encode(text))
    assert whole == text
    assert [piece for piece in pieces if piece] == [text]


def test_an_answer_cut_inside_a_character_ends_with_one_replacement_character(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("가뷁")[:-1]
    _, whole, _ = _pieces(tokenizer, tokens)
    assert whole == tokenizer.decode(tokens) == "가\ufffd"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_to_what_decoding_them_at_once_gives(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    _, whole, _ = _pieces(tokenizer, tokens)
    assert whole == tokenizer.decode(tokens)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_stop_string_ends_every_text_that_holds_it_and_is_never_released(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    text = data.draw(st.text(alphabet="ab가나\n", max_size=30))
    stops = tuple(data.draw(st.lists(st.text(alphabet="ab가나\n", min_size=1, max_size=3), max_size=3)))
    _, whole, stopped = _pieces(tokenizer, tokenizer.encode(text), stops)
    places = [text.find(stop) for stop in stops if stop in text]
    assert (stopped is not None) == bool(places)
    # A stop string counts from the moment it is complete, so a longer one that began earlier may still be open.
    assert text.startswith(whole)
    assert all(stop not in whole for stop in stops)
    if not places:
        assert whole == text


def test_no_part_of_a_stop_string_is_ever_emitted(tokenizer: Tokenizer) -> None:
    _, whole, stopped = _pieces(tokenizer, tokenizer.encode("one\n\ntwo"), ("\n\n",))
    assert whole == "one"
    assert stopped == "\n\n"
    _, whole, stopped = _pieces(tokenizer, tokenizer.encode("one\ntwo"), ("\n\n",))
    assert (whole, stopped) == ("one\ntwo", None)


def test_special_tokens_and_rows_beyond_the_vocabulary_give_no_text(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("가"), tokenizer.special_tokens["<|user|>"], tokenizer.vocab_size + 5]
    assert _pieces(tokenizer, tokens)[1] == "가"


def test_a_tokenizer_that_drops_a_leading_space_streams_the_same_text(tokenizer: Tokenizer) -> None:
    class Metaspace:
        """The first token loses its space, as in tokenizers made by SentencePiece."""

        special_tokens: ClassVar[dict[str, int]] = {"</s>": 0}
        vocab_size = 10
        words = ("", "▁a", "▁b", "c", "▁한", "글")

        def encode(self, text: str) -> list[int]:
            return [self.words.index("▁" + word) for word in text.split()]

        def token_bytes(self, token: int) -> bytes:
            return self.words[token].replace("▁", " ").encode()

        def decode(self, tokens: list[int], skip_special: bool = True) -> str:
            return b"".join(self.token_bytes(token) for token in tokens).decode().removeprefix(" ")

    model = Metaspace()
    detokenizer = Detokenizer(model)
    assert not detokenizer.is_bytes
    stream = detokenizer.stream()
    pieces = [stream.push(token) for token in (1, 2, 3, 4, 5, 0, 1)]
    assert pieces == ["a", " b", "c", " 한", "글", "", " a"]
    assert stream.finish() == ""
