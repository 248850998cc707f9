"""Tasks and suites: listed without lm-eval, and refused with a reason when they cannot run."""

import json
import subprocess
import sys

import pytest

from hcx.errors import EvalError
from hcx.evals.catalog import find_tasks, load_suite, status_of, suite_names, task_cards
from hcx.evals.sources import missing_data

NAMES = [
    "hcx_bpb_code",
    "hcx_bpb_en",
    "hcx_bpb_ko",
    "hcx_kmmlu_dev225",
    "hcx_mmlu_dev282",
    "hcx_translation_en_ko",
    "hcx_translation_ko_en",
]


def test_every_shipped_task_has_metadata_and_belongs_to_the_suite_it_names():
    cards = task_cards()
    assert list(cards) == NAMES
    for name, card in cards.items():
        assert name in [task.name for task in load_suite(card.metadata.suite).tasks]
        assert len(card.metadata.protocol) > 40


@pytest.mark.parametrize("name", ["smoke", "demo"])
def test_shipped_suites_list_known_tasks(name):
    assert name in suite_names()
    assert load_suite(name).tasks


def test_an_unknown_task_is_answered_with_the_nearest_name():
    with pytest.raises(EvalError, match="did you mean 'hcx_kmmlu_dev225'"):
        find_tasks(["hcx_kmmlu_dev22"])


def test_an_unknown_suite_is_answered_with_the_nearest_name():
    with pytest.raises(EvalError, match="did you mean 'smoke'"):
        load_suite("smok")


WITHOUT_LM_EVAL = """
import sys
sys.modules["lm_eval"] = None
sys.modules["torch"] = None
from hcx.cli.main import main
main(["eval", "--list", "--json"])
"""


def test_the_list_works_without_lm_eval_and_says_what_to_install():
    answer = subprocess.run([sys.executable, "-c", WITHOUT_LM_EVAL], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    rows = json.loads(answer.stdout)
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        assert set(row) >= {"name", "suite", "language", "category", "status", "reason"}
        assert row["status"] == "unavailable"
        assert "pip install 'hcx-llm[eval]'" in row["reason"]


def test_missing_item_files_are_reported_with_the_file_to_put_there(tmp_path, monkeypatch):
    monkeypatch.setattr("hcx.evals.sources.lm_eval_tasks", lambda: tmp_path)
    reason = missing_data("kmmlu-dev225", "ko")
    assert "kmmlu-dev225.jsonl" in reason
    assert "--data" in reason
    assert "HCX_EVAL_DATA" in reason


def test_a_users_item_file_makes_a_task_run(item_files, monkeypatch):
    monkeypatch.setattr("hcx.evals.sources.lm_eval_tasks", lambda: None)
    assert missing_data("kmmlu-dev225", "ko") is not None
    assert missing_data("kmmlu-dev225", "ko", item_files) is None
    monkeypatch.setenv("HCX_EVAL_DATA", str(item_files))
    assert missing_data("kmmlu-dev225", "ko") is None


def test_a_data_folder_that_does_not_exist_is_named(tmp_path):
    assert "no such folder" in missing_data("kmmlu-dev225", "ko", tmp_path / "nowhere")


def test_status_lists_every_suite_of_a_task():
    assert status_of(task_cards()["hcx_bpb_ko"]).suites == ["demo", "smoke"]
