"""Letter-answer tasks: rows of one form, options shuffled the same way everywhere, every letter one token."""

import math

import datasets
import pytest

from hcx.errors import DataError
from hcx.evals import letters
from hcx.evals.published_sets import published_sets

ARC = {
    "id": "x",
    "question": "Which grows on trees?",
    "choices": {"label": ["1", "2", "3", "4"], "text": ["an apple", "the sea", "a cloud", "a stone"]},
    "answerKey": "1",
}


def rows(process, *items):
    return list(process(datasets.Dataset.from_list(list(items))))


def test_shuffled_options_keep_the_answer_and_do_not_depend_on_other_items():
    (first,) = rows(letters.arc, ARC)
    again = rows(letters.arc, {**ARC, "question": "Another?"}, ARC)[1]
    assert first == again
    assert first["choices"][first["gold"]] == "an apple"
    assert sorted(first["choices"]) == sorted(ARC["choices"]["text"])


def test_shuffling_puts_the_answer_everywhere():
    found = {rows(letters.arc, {**ARC, "question": f"Question {i}?"})[0]["gold"] for i in range(60)}
    assert found == {0, 1, 2, 3}


def test_options_may_be_a_list_of_mappings():
    listed = [{"label": label, "text": text} for label, text in zip(*ARC["choices"].values(), strict=True)]
    assert rows(letters.arc, {**ARC, "choices": listed}) == rows(letters.arc, ARC)


def test_a_column_that_is_not_there_stops_the_run_and_names_those_that_are():
    with pytest.raises(
        DataError, match=r"item 0: not of the expected schema \(KeyError.*sol2.*columns: goal, label, sol1"
    ):
        rows(letters.piqa, {"goal": "x", "sol1": "y", "label": 0})


def test_an_answer_that_is_no_option_stops_the_run():
    with pytest.raises(DataError, match="the answer is not among its 2 options"):
        rows(letters.piqa, {"goal": "x", "sol1": "y", "sol2": "z", "label": 2})


def test_hidden_answers_are_not_taken_for_the_first_option():
    # The test split of X-CSQA has empty answers.
    with pytest.raises(DataError, match="not of the expected schema"):
        rows(letters.x_csqa, {"question": {"stem": "x", "choices": ARC["choices"]}, "answerKey": ""})


def test_hellaswag_text_is_cleaned_as_lm_eval_cleans_it():
    from lm_eval.tasks.hellaswag.utils import process_docs

    item = {
        "activity_label": "Baking",
        "ctx_a": "She mixes flour [step] and  water.",
        "ctx_b": "the dough [title] rests",
        "endings": ["She bakes it [substeps] now.", "b", "c", "d"],
        "label": "2",
    }
    data = datasets.Dataset.from_list([item])
    (theirs,) = process_docs(data)
    (ours,) = letters.hellaswag(data)
    assert (ours["question"], ours["choices"], ours["gold"]) == (theirs["query"], theirs["choices"], theirs["gold"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from hcx.model.convert.tokenizer import transformers_tokenizer
    from hcx.testing.evaluation import evaluable_directory

    return transformers_tokenizer(evaluable_directory(tmp_path_factory.mktemp("letters") / "model"))


@pytest.mark.parametrize("delimiter", [" ", "\n", ""])
@pytest.mark.parametrize("cue", ["Answer:", "정답:", "정답："])
def test_every_letter_takes_as_many_tokens_after_the_cue(delimiter, cue, tokenizer):
    """Otherwise the restricted choice would compare sums over different numbers of tokens."""
    context = tokenizer.encode(cue)
    for letter in letters.KOBALT_LETTERS:
        whole = tokenizer.encode(f"{cue}{delimiter}{letter}")
        assert whole[: len(context)] == context
        assert len(whole) == len(tokenizer.encode(f"{cue}{delimiter}A"))


def test_ratings_become_nsmcs_labels_and_the_middle_is_left_out(tmp_path):
    (tmp_path / "nsmc").mkdir()
    rows = [f"1\t{rating}\t{rating}\t{rating}점짜리 영화" for rating in range(1, 11)]
    (tmp_path / "nsmc" / "reviews.test.tsv").write_text("\n".join(["movie_id\treview_id\trating\treview", *rows]))
    (found,) = published_sets(tmp_path, {"e9t/nsmc"})
    assert [row["label"] for row in found.splits["test"]] == [0, 0, 0, 0, 1, 1]
    asked = letters.nsmc(found.splits["test"])
    assert letters.korean_prompt(asked[5]).endswith("A. 부정적이다\nB. 긍정적이다\n정답：")
    labels = [row["gold"] for row in asked]
    assert sorted(labels) == [0, 0, 0, 0, 1, 1] != labels
    assert [row["question"] for row in letters.nsmc(found.splits["test"][::-1])] == [row["question"] for row in asked]


def test_one_who_always_says_the_same_is_at_chance_however_rare_the_other_class_is():
    asked = [{"gold": int(number < 24)} for number in range(25)]
    always_second = [letters.score_classes(doc, [(-2.0, False), (-1.0, True)]) for doc in asked]
    assert sum(row["acc"] for row in always_second) / 25 == 0.96
    pairs = [row["balanced_acc"] for row in always_second]
    assert letters.balanced_accuracy(pairs) == 0.5
    three = [(0, 0, 3), (1, 1, 3), (1, 0, 3), (2, 1, 3)]
    assert letters.balanced_accuracy(three) == pytest.approx((1 + 0.5 + 0) / 3)
    assert math.isnan(letters.balanced_accuracy(three[:3]))
