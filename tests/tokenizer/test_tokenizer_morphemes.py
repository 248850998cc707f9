"""Where Korean text is cut: at surface offsets only, between stem and tail, never inside a contraction."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcx.config import decode
from hcx.errors import ConfigError, MissingExtra
from hcx.testing.tokenizers import AWKWARD, analyser
from hcx.tokenizer import morphemes as module
from hcx.tokenizer import train_tokenizer
from hcx.tokenizer.morphemes import KiwiAnalyser, Morpheme, cuts
from hcx.tokenizer.recipe import MorphemeBpe, TokenizerRecipe


def kiwi() -> KiwiAnalyser:
    pytest.importorskip("kiwipiepy", reason="kiwipiepy (extra korean) is not installed")
    return analyser()


def pieces(line: str, granularity: str) -> list[str]:
    (found,) = kiwi().morphemes([line])
    edges = [0, *cuts(line, found, granularity), len(line)]
    return [line[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("line", "fine", "coarse"),
    [
        ("학교에서", ["학교", "에서"], ["학교", "에서"]),
        ("학교에서는", ["학교", "에서", "는"], ["학교", "에서는"]),
        # One syllable holds the end of the stem and the start of the tail: the cut is before it, or nowhere.
        ("공부했다", ["공부", "했", "다"], ["공부", "했다"]),
        ("간다", ["간다"], ["간다"]),
        ("API를", ["API", "를"], ["API", "를"]),
        ("학생입니다", ["학생", "입니다"], ["학생", "입니다"]),
        ("plain English, 123", ["plain English, 123"], ["plain English, 123"]),
    ],
)
def test_stems_and_tails_are_the_pieces(line: str, fine: list[str], coarse: list[str]) -> None:
    assert pieces(line, "fine") == fine
    assert pieces(line, "coarse") == coarse


def test_white_space_goes_with_what_follows_it() -> None:
    assert pieces("학교에서  공부를\t한다", "coarse") == ["학교", "에서  공부", "를\t한다"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(st.text(max_size=20), st.sampled_from([*AWKWARD, "\U0001f600학교에서\U0001f600 먹었다"])), max_size=4
    ).map("".join),
    st.sampled_from(["fine", "coarse"]),
)
def test_pieces_concatenate_to_any_text(line: str, granularity: str) -> None:
    assert "".join(pieces(line, granularity)) == line


def test_offsets_count_code_points_beyond_the_basic_plane_as_one() -> None:
    assert pieces("\U0001f600\U0001f600 학교에서", "coarse") == ["\U0001f600\U0001f600 학교", "에서"]


def test_no_cut_lies_inside_a_morpheme_that_overlaps_others() -> None:
    overlapping = [Morpheme(0, 2, False), Morpheme(1, 3, True), Morpheme(3, 4, True)]
    assert cuts("버렸었다", overlapping, "fine") == [3]
    assert cuts("버렸었다", overlapping, "coarse") == []


def test_without_the_analyser_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "kiwipiepy", None)
    with pytest.raises(MissingExtra, match=r"hcx-llm\[korean\]"):
        train_tokenizer(["가"], 512, algorithm=MorphemeBpe())


def test_without_sentencepiece_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"hcx-llm\[korean\]"):
        train_tokenizer(["가"], 512, algorithm=MorphemeBpe(granularity="none"))


def test_no_independent_analyser_is_claimed_where_none_is_installed(monkeypatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module.independent_analyser() is None


def test_the_independent_analyser_gives_surface_places() -> None:
    pytest.importorskip("mecab", reason="python-mecab-ko (extra judge) is not installed")
    found_analyser = module.independent_analyser()
    assert found_analyser is not None
    line = "\U0001f600 학교에서 먹었다"
    (found,) = found_analyser.morphemes([line])
    edges = [0, *cuts(line, found, "fine"), len(line)]
    assert [line[a:b] for a, b in itertools.pairwise(edges)] == ["\U0001f600 학교", "에서 먹", "었", "다"]


def test_encoding_needs_no_analyser(monkeypatch) -> None:
    tokenizer = train_tokenizer(["학교에서 공부했다. " * 20], 512, algorithm=MorphemeBpe(crossing=0), analyser=kiwi())
    for name in ("kiwipiepy", "sentencepiece"):
        monkeypatch.setitem(sys.modules, name, None)
    assert tokenizer.decode(tokenizer.encode("학교에서")) == "학교에서"
    assert "학교".encode() in [tokenizer.token_bytes(i) for i in tokenizer.encode("학교에서")]


def test_an_unknown_algorithm_or_granularity_is_refused_with_the_valid_ones() -> None:
    for algorithm in ({"kind": "wordpiece"}, {"kind": "morpheme-bpe", "granularity": "coarser"}):
        with pytest.raises(ConfigError, match="algorithm"):
            decode(TokenizerRecipe, {"vocab_size": 512, "data": "x.yaml", "algorithm": algorithm}, "recipe.yaml")
