"""What morpheme boundaries buy and cost, at equal vocabulary and data, and what really shortens Korean."""

from __future__ import annotations

import pytest

pytest.importorskip("sentencepiece", reason="sentencepiece (extra korean) is not installed")
pytest.importorskip("kiwipiepy", reason="kiwipiepy (extra korean) is not installed")

from hcx.testing.tokenizers import VOCAB_SIZE, texts_of, tokenizer_of
from hcx.tokenizer import Tokenizer, train_tokenizer
from hcx.tokenizer.evaluation_text import evaluation_folder, out_of_domain_texts, treebanks
from hcx.tokenizer.gold import GoldSentence, gold_sentence, score_boundaries

LARGEST_LOSS = 0.05
"""Of bytes per token that coarse boundaries may cost on text of another kind (specification, acceptance item 7)."""

SHARE_OF_TOKENS = 0.6
"""A tokenizer that learnt Korean writes it in at most this share of the tokens of one that did not (the same item)."""

TRAINER_TOLERANCE = 0.01
"""Two BPE trainers break ties between equally frequent pairs differently; they must agree on everything else."""

MARKED = (
    "우리|는 내일 학교|에서 한국어|를 배우|겠|다",
    "그|는 책|을 읽|고 친구|에게 편지|를 쓰|었|다",
    "비|가 오|면 집|에서 영화|를 보|자",
    "어머니|께서 시장|에서 사과|와 배|를 사|오|시|었|다",
    "바다|가 보이|는 방|에서 잠|을 자|았|습니다",
    "산|에 오르|기 전|에 물|을 마시|어라",
    "이 마을|에는 오래|된 나무|가 많|습니다",
    "동생|이 그림|을 그리|면서 노래|를 부르|었|다",
    "선생님|의 말씀|을 듣|고 생각|을 바꾸|었|다",
    "겨울|이 지나|고 봄|이 오|았|다",
)
"""Sentences of our own with their morphemes marked where they are written; no contraction is among them."""


def marked() -> list[GoldSentence]:
    found = []
    for line in MARKED:
        sentence = gold_sentence(line.replace("|", ""), [(w.replace("|", ""), w.split("|")) for w in line.split()])
        assert sentence is not None
        found.append(sentence)
    return found


def f1(tokenizer: Tokenizer, sentences: list[GoldSentence]) -> float:
    return score_boundaries(lambda text: [tokenizer.token_bytes(i) for i in tokenizer.encode(text)], sentences).f1


def tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text))


def shared_folder():
    folder = evaluation_folder()
    if folder is None:
        pytest.skip("the evaluation sets are not here (HCX_SHARED_DATA, or ../shared/data beside the checkout)")
    return folder


def test_tokens_end_at_marked_morphemes_more_often_with_boundaries_than_without() -> None:
    assert f1(tokenizer_of("none"), marked()) < f1(tokenizer_of("coarse"), marked())
    assert f1(tokenizer_of("none"), marked()) < f1(tokenizer_of("fine"), marked())


def test_tokens_end_at_the_morphemes_of_two_treebanks_more_often_with_boundaries_than_without() -> None:
    for sentences in treebanks(shared_folder()).values():
        plain, coarse, fine = (f1(tokenizer_of(name), sentences) for name in ("none", "coarse", "fine"))
        assert plain < coarse < fine


def test_coarse_boundaries_cost_little_on_korean_of_another_kind() -> None:
    texts = [text for text in out_of_domain_texts(shared_folder()) if text.name.startswith("ko ")]
    assert len(texts) == 3
    for text in texts:
        plain, coarse = (tokens(tokenizer_of(name), text.content) for name in ("none", "coarse"))
        assert coarse <= plain / (1 - LARGEST_LOSS), text.name


def test_both_trainers_without_boundaries_learn_equally_compact_tokens() -> None:
    learnt = [text for language in ("ko", "en", "code") for text in texts_of(language)[0]]
    plain = train_tokenizer(learnt, VOCAB_SIZE)
    for language in ("ko", "en"):
        text = "\n".join(texts_of(language)[1])
        assert tokens(tokenizer_of("none"), text) == pytest.approx(tokens(plain, text), rel=TRAINER_TOLERANCE)


def test_korean_in_the_training_text_is_what_shortens_korean() -> None:
    text = "\n".join(texts_of("ko")[1])
    without = tokens(tokenizer_of("coarse", ("en", "code")), text)
    assert tokens(tokenizer_of("coarse"), text) <= SHARE_OF_TOKENS * without
    assert tokens(tokenizer_of("none"), text) <= SHARE_OF_TOKENS * tokens(tokenizer_of("none", ("en", "code")), text)
