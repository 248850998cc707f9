"""Tasks and suites: listed without lm-eval, and refused with a reason when they cannot run."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hcx.errors import EvalError
from hcx.evals.catalog import EXTRA_OF, find_tasks, load_suite, status_of, suite_names, task_cards
from hcx.evals.sources import missing_data

SHIPPED_WITH_DATA = {
    "hcx_bpb_code",
    "hcx_bpb_en",
    "hcx_bpb_ko",
    "hcx_kmmlu_dev225",
    "hcx_mmlu_dev282",
    "hcx_translation_en_ko",
    "hcx_translation_ko_en",
}

SUITES = {
    *("korean", "english", "commonsense", "factuality", "math", "code", "chat", "instruction", "harmlessness"),
    *("translation", "crosslingual", "hcx-report", "korean-2026", "published", "smoke", "demo"),
}

REPORT_ROWS = {*map(str, range(1, 38)), "18b"}
"""Rows of the specification's list of benchmarks (section 3.3)."""

IN_HOUSE = {"kobigbench", "k_humaneval", "ko_mt_bench", "koif"}
"""Nobody outside has their data."""


def test_every_task_has_metadata_and_belongs_to_the_suite_it_names():
    cards = task_cards()
    assert set(cards) >= SHIPPED_WITH_DATA
    for name, card in cards.items():
        assert name in [task.name for task in load_suite(card.metadata.suite).tasks]
        assert len(card.metadata.protocol) > 20


def test_tasks_with_shipped_items_run_and_the_others_say_what_they_need(monkeypatch):
    for name in ("HCX_EVAL_DATA", "HCX_TOXICITY_SCORER", "HCX_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("lm_eval")
    statuses = {name: status_of(card) for name, card in task_cards().items()}
    assert {name for name, status in statuses.items() if status.status == "runs"} == SHIPPED_WITH_DATA
    assert all(status.reason for status in statuses.values() if status.status != "runs")
    assert "hcx eval fetch" in statuses["kmmlu"].reason
    assert "toxicity scorer" in statuses["hcx_bold"].reason
    assert "judge" in statuses["hcx_mt_bench"].reason


def test_every_row_of_the_reports_list_is_a_task_or_is_unavailable_for_a_reason():
    cards = task_cards()
    assert {row for card in cards.values() for row in card.metadata.rows} == REPORT_ROWS
    listed = {task.name for task in load_suite("hcx-report").tasks}
    assert listed == {name for name, card in cards.items() if card.metadata.rows}


def test_in_house_sets_are_never_imitated_under_their_names():
    for name in IN_HOUSE:
        status = status_of(task_cards()[name])
        assert (status.status, status.reason.split(":")[0]) == ("unavailable", "in-house")
    stand_ins = {name for name in task_cards() if "bigbench" in name or "koif" in name or "k_humaneval" in name}
    assert stand_ins == {"kobigbench", "koif", "k_humaneval"}


def test_a_task_that_the_report_cannot_be_compared_with_says_why():
    cards = task_cards()
    for name in ("hellaswag", "winogrande", "piqa", "arc_easy", "hcx_bold", "hcx_flores_en_ko", "hcx_superni"):
        assert cards[name].metadata.gap
    assert not cards["mmlu"].metadata.gap


def test_the_shipped_suites_list_known_tasks():
    assert set(suite_names()) == SUITES
    for name in SUITES:
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
    assert {row["name"] for row in rows} == set(task_cards())
    for row in rows:
        assert set(row) >= {"name", "suite", "language", "category", "status", "reason", "rows", "gap"}
        assert row["status"] == "unavailable"
        extras = "eval,math" if row["name"] == "minerva_math" else "eval"
        assert f"pip install 'hcx-llm[{extras}]'" in row["reason"] or task_cards()[row["name"]].benchmark.unavailable


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


def test_packages_are_asked_for_by_the_extra_that_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcx.evals.catalog.is_installed", lambda name: name not in ("math_verify", "langdetect"))
    assert status_of(task_cards()["minerva_math"]).reason.endswith("pip install 'hcx-llm[math]'")
    assert status_of(task_cards()["ifeval"]).reason.endswith("pip install 'hcx-llm[eval]'")
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))
    assert set(EXTRA_OF.values()) <= set(project["project"]["optional-dependencies"])


def test_a_set_that_is_not_on_the_hub_is_asked_for_as_files() -> None:
    cards = task_cards()
    assert "its authors' files in a FOLDER, then --from FOLDER" in status_of(cards["hcx_kosbi"]).reason
    assert "hcx eval fetch hcx_klue_nli --out BUNDLE" in status_of(cards["hcx_klue_nli"]).reason
