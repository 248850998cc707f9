"""Prefix match, answers of mathematics, majority, ROUGE-L, mc2."""

import math

import datasets
import pytest

from hcx.evals import matching


@pytest.mark.parametrize(
    ("prediction", "golds", "matches"),
    [
        ("Seoul, of course. Question: next", ["Seoul"], True),
        ("the Han River is", ["Han River"], True),
        ("Seoulite", ["Seoul"], False),
        ("It is Seoul", ["Seoul"], False),
        ("서울이다", ["서울"], False),
        ("서울 시", ["서울"], True),
        ("ＳＥＯＵＬ", ["seoul"], True),
        ("", ["Seoul"], False),
        ("anything", ["the"], False),
        ("1,000 people", ["1,000"], True),
    ],
)
def test_a_prefix_matches_up_to_a_word_boundary(prediction, golds, matches):
    assert matching.prefix_match(prediction, golds) is matches


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 3+4=7. The answer is 7.", "7"),
        ("so it is $1,234.50 in all\n#### 1,234.50", "1234.5"),
        ("The answer is 5.\n\nQ: Another? A: The answer is 9.", "5"),
        ("7 and then 8", "8"),
        ("no digits here", None),
        ("The answer is -0.", "0"),
        ("The answer is 007", "7"),
    ],
)
def test_the_answer_of_a_word_problem_is_read(text, answer):
    assert matching.gsm8k_answer(text) == answer


def test_majority_counts_unreadable_answers_as_one_vote_and_lets_the_first_win_ties():
    assert matching.majority(["2", "1", "1", "2"]) == "2"
    assert matching.majority([None, None, "1"]) is None
    assert matching.score_gsm8k({"answer": "#### 4"}, [["x", "x", "The answer is 4"]])["maj"] == 0.0
    assert matching.score_gsm8k({"answer": "#### 4"}, [["The answer is 4", "x", "The answer is 4"]]) == {
        "maj": 1.0,
        "first": 1.0,
    }


def test_gold_without_an_answer_is_never_matched_by_silence():
    assert matching.score_gsm8k({"answer": "none"}, [["also none"]])["maj"] == 0.0
    assert matching.score_math({"solution": "no box"}, [["no box either"]])["maj"] == 0.0


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\frac{1}{2}", r"\dfrac12"),
        ("1/2", r"\frac{1}{2}"),
        ("x = 5", "5"),
        (r"\left( 3, 4 \right)", "(3,4)"),
        ("1,000", "1000"),
        (r"50\%", "50"),
        (r"\text{even}", "even"),
    ],
)
def test_spellings_of_one_answer_are_equal(left, right):
    assert matching.math_form(left) == matching.math_form(right)


def test_the_box_is_read_with_its_braces():
    assert matching.boxed(r"so \boxed{\frac{1}{\sqrt{2}}} is it") == r"\frac{1}{\sqrt{2}}"
    assert matching.boxed(r"\boxed{1} then \boxed{2}") == "2"
    assert matching.boxed(r"\boxed{never closed") is None


def test_rouge_l_equals_its_definition():
    # LCS of 4 words over 5 and 6 words.
    precision, recall = 4 / 5, 4 / 6
    expected = 2 * precision * recall / (precision + recall)
    found = matching.rouge_l("a b c d z", ["a b x c y d", "nothing in common"])
    assert math.isclose(found, expected)


def test_mc2_is_the_share_of_probability_of_true_answers():
    doc = {"mc2_targets": {"labels": [1, 0, 1]}}
    logprobs = [math.log(0.1), math.log(0.3), math.log(0.2)]
    found = matching.truthful_mc2(doc, [(value, False) for value in logprobs])["mc2"]
    assert math.isclose(found, 0.3 / 0.6)


def test_mc2_equals_lm_evals():
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    # lm-eval expects the true answers first.
    doc = {"mc2_targets": {"labels": [1, 1, 0, 0]}}
    results = [(-3.0, False), (-1.0, False), (-2.0, True), (-700.0, False)]
    assert matching.truthful_mc2(doc, results)["mc2"] == pytest.approx(process_results_mc2(doc, results)["acc"])


def test_super_ni_takes_ten_instances_of_each_task_and_joins_their_references():
    items = [
        {"task_name": f"t{t}", "definition": "d", "inputs": f"i{i}", "targets": target}
        for t in range(2)
        for i in range(12)
        for target in ("x", "y")
    ]
    rows = list(matching.super_ni(datasets.Dataset.from_list(items)))
    assert len(rows) == 20
    assert all(row["targets"] == ["x", "y"] for row in rows)
