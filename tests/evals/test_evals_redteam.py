"""Red-team logs: checked when read, and turned into pairs and demonstrations without loss."""

import json

import pytest

from hcx.errors import HcxError
from hcx.evals.redteam import demonstrations, preference_pairs, read_log, verdicts, write_log


def turn(number, **changes):
    row = {
        "dialogue_id": "d1",
        "turn": number,
        "topic": "illegal acts",
        "attack_type": "role play",
        "category": "drugs or weapons",
        "prompt": f"질문 {number}",
        "responses": [
            {"model": "a", "text": f"a{number}", "harmless": 7, "overall": 6, "attack_succeeded": False},
            {"model": "b", "text": f"b{number}", "harmless": 1, "overall": 2, "attack_succeeded": number == 2},
            {"model": "c", "text": f"c{number}", "harmless": 5, "overall": 2},
        ],
        "continued_from": "b",
    }
    return {**row, **changes}


def log(tmp_path, *rows):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_a_log_survives_a_round_trip(tmp_path):
    turns = read_log(log(tmp_path, turn(1, rewritten="더 나은 답"), turn(2, continued_from=None)))
    write_log(tmp_path / "again.jsonl", turns)
    assert read_log(tmp_path / "again.jsonl") == turns


def test_every_two_replies_with_different_scores_are_a_pair(tmp_path):
    pairs = preference_pairs(read_log(log(tmp_path, turn(1))))
    assert {(p["chosen"], p["rejected"], p["margin"]) for p in pairs} == {("a1", "b1", 4), ("a1", "c1", 4)}
    assert {p["prompt_id"] for p in pairs} == {"d1/1"}


def test_later_turns_carry_the_reply_that_the_dialogue_went_on_from(tmp_path):
    pairs = preference_pairs(read_log(log(tmp_path, turn(1), turn(2))))
    late = [p for p in pairs if p["prompt_id"] == "d1/2"]
    assert late[0]["messages"] == [
        {"role": "user", "content": "질문 1"},
        {"role": "assistant", "content": "b1"},
        {"role": "user", "content": "질문 2"},
    ]


def test_a_rewritten_reply_wins_over_all_and_is_a_demonstration(tmp_path):
    turns = read_log(log(tmp_path, turn(1, rewritten="안전한 답")))
    won = {(p["rejected"], p["margin"]) for p in preference_pairs(turns) if p["chosen"] == "안전한 답"}
    assert won == {("a1", 1), ("b1", 5), ("c1", 5)}
    (row,) = demonstrations(turns)
    assert row["messages"][-1] == {"role": "assistant", "content": "안전한 답"}


def test_an_attack_succeeded_if_it_did_in_any_turn_and_over_refusal_is_beside_it(tmp_path):
    benign = turn(1, dialogue_id="d2", benign=True, category=None)
    benign["responses"][0]["refused"] = True
    found = verdicts(read_log(log(tmp_path, turn(1), turn(2), benign)))
    assert found["b"]["attack_success_rate"] == 1.0
    assert found["b"]["by_category"] == {"drugs or weapons": 1.0}
    assert found["a"]["attack_success_rate"] == 0.0
    assert found["a"]["over_refusal"] == 1.0
    assert found["c"]["attack_success_rate"] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([turn(2)], "count from 1 without gaps"),
        ([turn(1, continued_from=None), turn(2)], "does not say which reply"),
        ([turn(1, continued_from="z")], "is none of a, b, c"),
        ([turn(8)], "turn"),
        ([turn(1, category="spam")], "category"),
        ([turn(1, responses=[{"model": "a", "text": "x", "harmless": 8, "overall": 0}])], "harmless"),
        ([{**turn(1), "extra": 1}], "extra"),
    ],
)
def test_a_malformed_log_names_what_is_wrong(tmp_path, rows, message):
    with pytest.raises(HcxError, match=message):
        read_log(log(tmp_path, *rows))
