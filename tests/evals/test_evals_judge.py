"""Judges: asked once, recorded, replayed without a network; what cannot be read ends the run."""

import json
import urllib.error

import pytest

from hcx.errors import EvalError
from hcx.evals import judge as judging
from hcx.evals.judge import RecordedJudge, judge_chat, judge_facts, rating


class Endpoint:
    """An OpenAI-compatible endpoint that answers from a function."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, url, headers, body, timeout_s):
        self.calls.append((url, headers, json.loads(body)))
        return json.dumps({"choices": [{"message": {"content": self.answer(json.loads(body)["messages"])}}]}).encode()


class Speaker:
    def __init__(self):
        self.seen = []

    def answers(self, dialogues):
        self.seen += dialogues
        return [f"답 {len(dialogue)}" for dialogue in dialogues]


def test_a_call_is_recorded_and_replayed_without_the_endpoint(tmp_path):
    endpoint = Endpoint(lambda messages: "Rating: [[7]]")
    record = tmp_path / "calls.jsonl"
    messages = [{"role": "user", "content": "질문"}]
    first = RecordedJudge("m", "http://host/v1", record, api_key="sk-secret", transport=endpoint)
    assert first.ask(messages) == first.ask(messages) == "Rating: [[7]]"
    assert len(endpoint.calls) == 1
    assert endpoint.calls[0][0] == "http://host/v1/chat/completions"
    assert endpoint.calls[0][1]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in record.read_text()
    replayed = RecordedJudge("m", None, record)
    assert replayed.ask(messages) == "Rating: [[7]]"
    with pytest.raises(EvalError, match="holds no answer to this call"):
        replayed.ask([{"role": "user", "content": "another"}])
    with pytest.raises(EvalError, match="holds no answer"):
        RecordedJudge("another-model", None, record).ask(messages)


def test_a_failing_endpoint_is_asked_again_and_then_ends_the_run():
    calls = []

    def failing(url, headers, body, timeout_s):
        calls.append(1)
        raise urllib.error.HTTPError(url, 503, "busy", {}, None)

    with pytest.raises(EvalError, match="did not answer: HTTP 503"):
        RecordedJudge("m", "http://host/v1", transport=failing, pause_s=0).ask([])
    assert len(calls) == judging.ATTEMPTS


def test_a_refused_key_is_not_tried_again():
    calls = []

    def refused(url, headers, body, timeout_s):
        calls.append(1)
        raise urllib.error.HTTPError(url, 401, "no", {}, None)

    with pytest.raises(EvalError, match="HTTP 401"):
        RecordedJudge("m", "http://host/v1", transport=refused, pause_s=0).ask([])
    assert len(calls) == 1


@pytest.mark.parametrize("answer", ["good", "[[11]]", "[[0]]", "Rating: 7", ""])
def test_a_verdict_without_a_rating_ends_the_run(answer):
    with pytest.raises(EvalError, match="no rating from 1 to 10"):
        rating(answer)


def test_the_last_rating_counts():
    assert rating("I would not give [[3]]. Rating: [[8.5]]") == 8.5


def test_both_turns_are_asked_with_the_models_own_first_answer():
    speaker = Speaker()
    endpoint = Endpoint(lambda messages: "Rating: [[9]]" if "답 3" in messages[1]["content"] else "Rating: [[5]]")
    rows = [{"turns": ["하나", "둘"], "category": "writing"}, {"turns": ["셋"]}]
    judged = judge_chat(rows, speaker, RecordedJudge("m", "http://h/v1", transport=endpoint), "ko")
    assert speaker.seen[2] == [
        {"role": "user", "content": "하나"},
        {"role": "assistant", "content": "답 1"},
        {"role": "user", "content": "둘"},
    ]
    assert [row["ratings"] for row in judged] == [[5.0, 9.0], [5.0]]
    assert "another language" in endpoint.calls[0][2]["messages"][0]["content"]


def test_the_wrong_language_is_only_judged_in_korean():
    endpoint = Endpoint(lambda messages: "[[5]]")
    judge_chat([{"turns": ["x"]}], Speaker(), RecordedJudge("m", "http://h/v1", transport=endpoint), "en")
    assert "another language" not in endpoint.calls[0][2]["messages"][0]["content"]


def test_facts_are_counted_once_and_checked_against_the_article():
    def answer(messages):
        if "Split the text" in messages[0]["content"]:
            return "- 서울은 수도이다\n- 서울은 수도이다\n- 서울은 섬이다\nother text"
        return "False." if "섬" in messages[1]["content"].split("Fact:")[1] else "True"

    rows = [{"entity": "서울", "article": "서울은 수도이다."}]
    (judged,) = judge_facts(rows, Speaker(), RecordedJudge("m", "http://h/v1", transport=Endpoint(answer)))
    assert (judged["supported"], judged["facts"]) == (1, 2)


def test_a_verdict_that_is_neither_true_nor_false_ends_the_run():
    def answer(messages):
        return "- a fact" if "Split" in messages[0]["content"] else "Perhaps"

    with pytest.raises(EvalError, match="not True or False"):
        judge_facts(
            [{"entity": "x", "article": "y"}], Speaker(), RecordedJudge("m", "http://h/v1", transport=Endpoint(answer))
        )


def test_an_address_that_is_none_is_refused():
    with pytest.raises(EvalError, match="HCX_JUDGE_URL"):
        RecordedJudge("m", "host:80")
