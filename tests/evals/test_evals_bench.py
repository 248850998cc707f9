"""The measurement beside lm-eval's `hf` backend: same requests, same answers, on real Korean items."""

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from hcx.errors import EvalError
from hcx.evals.bench import AGREE, _chosen, measure
from hcx.evals.fetch import fetch
from hcx.testing.collection import shared_data
from hcx.testing.evaluation import evaluable_directory


class Asked:
    def __init__(self, item):
        self.task_name, self.doc_id = "t", item


def test_the_chosen_option_is_the_most_likely_and_the_first_of_equals():
    requests = [Asked(0), Asked(0), Asked(1), Asked(1), Asked(1)]
    answers = [(-2.0, False), (-1.0, True), (-3.0, False), (-1.5, False), (-1.5, False)]
    assert _chosen(requests, answers) == {("t", 0): 1, ("t", 1): 1}


def test_a_task_that_cannot_run_is_refused(tmp_path):
    with pytest.raises(EvalError, match=r"kobest_hellaswag.*needs-data"):
        measure(tmp_path, ["kobest_hellaswag"], None, 4)


@pytest.mark.slow  # lm-eval indexes its own thousands of task files first
@pytest.mark.skipif(shared_data() is None, reason="no collection of data sets: set HCX_SHARED_DATA")
def test_kobest_answers_equal_the_hf_backends_item_by_item(tmp_path):
    names = ["kobest_hellaswag", "kobest_boolq"]
    fetch(names, tmp_path / "bundle", shared_data())
    model = evaluable_directory(tmp_path / "model", max_seq_len=2048)
    for row in measure(model, names, tmp_path / "bundle", limit=6, repeats=1):
        assert row.items == 6
        assert row.same_answers
        assert row.largest_difference < AGREE
