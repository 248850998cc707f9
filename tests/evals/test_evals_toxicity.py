"""Toxicity: nothing counts that was not scored, and what scored it is written down."""

import datasets
import pytest

from hcx.errors import EvalError
from hcx.evals import toxicity
from hcx.evals.toxicity import NgramScorer, StubScorer, fit

KIND = ["오늘 날씨가 좋네요", "고마워요 잘 먹을게요", "What a lovely day", "the train leaves at nine", "책을 읽었다"]
TOXIC = ["꺼져 이 바보야", "너 같은 건 죽어라", "you are a stupid idiot", "shut up you idiot", "바보 멍청이 꺼져"]


@pytest.fixture
def scorer_file(tmp_path):
    texts = (KIND + TOXIC) * 4
    fit(texts, ([False] * 5 + [True] * 5) * 4, tmp_path / "scorer.json", bits=12)
    return tmp_path / "scorer.json"


@pytest.fixture(autouse=True)
def no_scorer(monkeypatch):
    monkeypatch.delenv(toxicity.VARIABLE, raising=False)
    toxicity._load.cache_clear()


def test_a_fitted_scorer_tells_kind_from_toxic_text_it_has_not_seen(scorer_file):
    scorer = NgramScorer.load(scorer_file)
    low, high = scorer.score(["날씨가 참 좋아요"]), scorer.score(["이 바보야 죽어라"])
    assert low[0] < 0.5 < high[0]
    assert scorer.score([""]) == [0.0]
    assert scorer.identity.startswith("scorer.json sha256")


def test_one_kind_of_label_cannot_be_fitted(tmp_path):
    with pytest.raises(EvalError, match="both kinds"):
        fit(KIND, [False] * 5, tmp_path / "x.json")


def test_without_a_scorer_nothing_is_scored():
    with pytest.raises(EvalError, match="HCX_TOXICITY_SCORER"):
        toxicity.score_toxicity({}, ["text"])


def test_a_failing_scorer_aborts_instead_of_counting_as_harmless(monkeypatch, tmp_path):
    class Broken:
        identity = "broken"

        def score(self, texts):
            return [float("nan")]

    monkeypatch.setattr(toxicity, "chosen_scorer", Broken)
    with pytest.raises(EvalError, match="not a number from 0 to 1"):
        toxicity.score_toxicity({}, ["text"])
    (tmp_path / "damaged.json").write_text('{"bits": 12}')
    with pytest.raises(EvalError, match="not a toxicity scorer"):
        NgramScorer.load(tmp_path / "damaged.json")


def test_the_stub_is_labelled_in_the_result(monkeypatch):
    monkeypatch.setenv(toxicity.VARIABLE, "stub")
    assert toxicity.score_toxicity({}, ["I hate it"]) == {"toxicity": 1.0, "toxic_share": 1.0}
    assert toxicity.scorer_identity() == StubScorer.identity
    assert "STUB" in StubScorer.identity


@pytest.mark.parametrize(
    ("text", "korean"),
    [
        ("안녕하세요", True),
        ("hello", False),
        ("반반 half한글", True),
        ("", False),
        ("123 !!", False),
        ("ㅋㅋㅋ ok", True),
    ],
)
def test_korean_is_half_of_the_letters(text, korean):
    assert toxicity.is_korean(text) is korean


def test_only_korean_continuations_are_scored_for_toxicity(monkeypatch):
    monkeypatch.setenv(toxicity.VARIABLE, "stub")
    english = toxicity.score_korean_toxicity({}, ["I hate it"])
    assert english == {"korean_rate": 0.0, "toxicity": None, "toxic_share": None}
    korean = toxicity.score_korean_toxicity({}, ["꺼져 버려"])
    assert korean == {"korean_rate": 1.0, "toxicity": 1.0, "toxic_share": True}
    assert toxicity.mean_of_scored([None, 1.0, 0.0]) == 0.5


def test_subsets_do_not_depend_on_the_order_of_the_file():
    rows = [{"prompt": {"text": f"prompt {i}"}} for i in range(700)]
    first = toxicity.realtoxicity_subset(datasets.Dataset.from_list(rows))
    second = toxicity.realtoxicity_subset(datasets.Dataset.from_list(rows[::-1]))
    assert list(first) == list(second)
    assert len(first) == toxicity.RTP_SIZE


def test_kold_shows_the_title_and_the_first_half_of_the_comment():
    (row,) = toxicity.kold_subset(datasets.Dataset.from_list([{"title": "제목", "comment": "하나 둘 셋 넷"}]))
    assert row["prompt"] == "제목: 제목\n댓글: 하나 둘"
