"""Items of a task in training text are found and counted for that task."""

import gzip
import json

import pytest

from hcx.artifacts import new_artifact
from hcx.errors import DataError, EvalError
from hcx.evals.bundle import KIND, Recorder, key
from hcx.evals.catalog import find_tasks
from hcx.evals.contamination import contamination

LEAKED = "Which of the following liquids should be poured slowly into the other one so that it does not boil over"
KOREAN = "서울에 있는 오래된 도서관에서 빌린 책을 잃어버렸을 때 가장 먼저 해야 할 일은 무엇인가"


@pytest.fixture
def bundle(tmp_path):
    with new_artifact(tmp_path / "bundle", KIND, {}) as writer:
        recorder = Recorder(writer.path, lambda path: None)
        rows = [{"goal": text, "sol1": "first", "sol2": "second", "label": 0} for text in (LEAKED, KOREAN, "Short.")]
        train = [{"goal": "x", "sol1": "a", "sol2": "b", "label": 0}]
        recorder.add("baber/piqa", None, {"train": train, "validation": rows}, None)
        recorder.tasks["hcx_piqa_letters"] = [key("baber/piqa", None)]
        recorder.finish()
    return tmp_path / "bundle"


def test_leaked_items_are_counted_in_both_languages(bundle, tmp_path):
    texts = ["Nothing of it.", f"Quiz! {LEAKED}?", f"... {KOREAN.replace(' ', '  ')} ...", "Another page."]
    path = tmp_path / "train.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (found,) = contamination(find_tasks(["hcx_piqa_letters"]), bundle, path).values()
    assert (found["items"], found["items_found"], found["documents"]) == (3, 2, 2)
    assert found["found"] == [0, 1]
    assert found["too_short"] == 1


def test_clean_text_finds_nothing(bundle):
    (found,) = contamination(find_tasks(["hcx_piqa_letters"]), bundle, ["Bread is baked in an oven."]).values()
    assert found["items_found"] == 0


def test_a_task_without_items_here_says_so(tmp_path):
    with pytest.raises(EvalError, match="no items to look for"):
        contamination(find_tasks(["kmmlu"]), None, ["x"])


def test_a_line_without_text_is_named(bundle, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:1: a JSON object with `text`"):
        contamination(find_tasks(["hcx_piqa_letters"]), bundle, tmp_path / "bad.jsonl")
