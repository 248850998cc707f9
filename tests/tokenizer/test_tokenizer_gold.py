"""Gold morphemes and what is scored against them."""

from __future__ import annotations

import json

import pytest

from hcx.errors import DataError
from hcx.tokenizer.evaluation_text import evaluation_folder, out_of_domain_texts, treebanks
from hcx.tokenizer.gold import align, analysed, gold_sentence, read_kaist, read_klue, score_boundaries
from hcx.tokenizer.morphemes import Morpheme


@pytest.mark.parametrize(
    ("form", "morphemes", "boundaries", "hidden"),
    [
        ("학교에서", ["학교", "에서"], {2}, []),
        ("학생입니다", ["학생", "이", "ᆸ니다"], {2}, [(3, 4)]),
        ("했다", ["하", "었", "다"], {1}, []),
        ("간다", ["가", "ㄴ다"], set(), [(1, 1)]),
        ("가서", ["가", "아서"], set(), [(1, 1)]),
        ("가요", ["가", "아요"], set(), [(1, 1)]),
        ("공부했습니다", ["공부", "하", "였", "습니다"], {2, 3}, []),
        ("흘렸다.", ["흘리", "었", "다", "."], {2, 3}, [(1, 1)]),
    ],
)
def test_morphemes_are_found_in_the_written_word_and_contractions_hidden(form, morphemes, boundaries, hidden) -> None:
    found, unknown = align(form, morphemes)
    assert found == boundaries
    assert unknown == hidden


def by(*sizes: int):
    """Cuts a text after so many bytes each."""

    def pieces(text: str) -> list[bytes]:
        content, found = text.encode(), []
        for size in sizes:
            found.append(content[:size])
            content = content[size:]
        return [*found, content]

    return pieces


def test_scores_are_precision_and_recall_of_token_ends_inside_words() -> None:
    sentence = gold_sentence("학교에서 산다.", [("학교에서", ["학교", "에서"]), ("산다", ["살", "ㄴ다"]), (".", ["."])])
    assert sentence is not None
    assert sentence.boundaries == {6, 19}
    # 학교|에서| 산다|. meets both; the end before the space is not judged.
    perfect = score_boundaries(by(6, 6, 7), [sentence])
    assert (perfect.precision, perfect.recall, perfect.f1, perfect.boundaries) == (1.0, 1.0, 1.0, 2)
    # An end inside a syllable is wrong, and one inside a word that is no boundary.
    poor = score_boundaries(by(1, 5, 3), [sentence])
    assert (poor.precision, poor.recall) == (1 / 3, 1 / 2)
    assert score_boundaries(by(12), [sentence]).f1 == 0


def test_a_token_end_inside_a_contraction_is_not_judged() -> None:
    sentence = gold_sentence("간다", [("간다", ["가", "ㄴ다"])])
    other = gold_sentence("학교에", [("학교에", ["학교", "에"])])
    assert sentence is not None
    assert other is not None
    assert 3 not in sentence.judged
    assert score_boundaries(lambda text: by(3)(text) if text == "간다" else by(6)(text), [sentence, other]).f1 == 1


def test_words_that_are_not_those_of_the_text_make_no_sentence() -> None:
    assert gold_sentence("학교에서", [("학교", ["학교"])]) is None
    assert gold_sentence("학교에서", [("집에서", ["집", "에서"])]) is None


def test_tokens_that_are_not_the_text_and_sentences_without_boundaries_are_refused() -> None:
    sentence = gold_sentence("학교에", [("학교에", ["학교", "에"])])
    assert sentence is not None
    with pytest.raises(DataError, match="are not the text"):
        score_boundaries(lambda text: [b"x"], [sentence])
    with pytest.raises(DataError, match="nothing to score"):
        score_boundaries(by(), [])


def test_both_treebank_formats_give_the_same_sentence(tmp_path) -> None:
    (tmp_path / "kaist.jsonl").write_text(
        json.dumps({"text": "나는 간다.", "words": [["나는", "나+는"], ["간다", "가+ㄴ다"], [".", "."]]}) + "\n"
    )
    (tmp_path / "klue.tsv").write_text(
        "## header\n\n## id-0\t나는 간다.\n1\t나는\t나 는\tNP+JX\t2\tNP\n2\t간다.\t가 ㄴ다 .\tVV+EF+SF\t0\tVP\n"
    )
    (kaist,) = read_kaist(tmp_path / "kaist.jsonl")
    (klue,) = read_klue(tmp_path / "klue.tsv")
    assert kaist.text == klue.text == "나는 간다."
    assert kaist.boundaries == klue.boundaries == {3, 13}
    with pytest.raises(DataError, match="not readable"):
        read_klue(tmp_path / "absent.tsv")


def test_an_analyser_judges_every_place_beside_hangul() -> None:
    class Stub:
        name = "stub"

        def morphemes(self, lines):
            return iter([[Morpheme(0, 2, False), Morpheme(2, 4, True)] for _ in lines])

    (sentence,) = analysed(Stub(), ["학교에서 ab"])
    assert sentence.boundaries == {6}
    assert {3, 6, 9} <= sentence.judged
    assert not {12, 13, 14} & sentence.judged


def test_the_shared_sets_are_read_whole_and_only_their_test_parts() -> None:
    folder = evaluation_folder()
    if folder is None:
        pytest.skip("the evaluation sets are not here (HCX_SHARED_DATA, or ../shared/data beside the checkout)")
    banks = treebanks(folder)
    assert len(banks) == 2
    for sentences in banks.values():
        assert len(sentences) > 1_900
        assert sum(len(sentence.boundaries) for sentence in sentences) > 20_000
    texts = out_of_domain_texts(folder)
    assert [text.name for text in texts] == ["ko prose", "ko reviews", "ko news", "en news", "code"]
    assert {text.domain for text in texts} == {"out"}
    assert all(len(text.content) > 30_000 for text in texts)
