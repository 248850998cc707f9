"""`hcx eval --check`: every task of ours is loaded strictly, with its functions, on rows of its data set's schema."""

import logging

import datasets
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("sacrebleu")

from hcx.evals import catalog, check, loading, run
from hcx.evals.catalog import task_cards


@pytest.fixture(scope="module")
def rows(item_files):
    ours = [name for name, card in task_cards().items() if card.is_ours]
    return {row["name"]: row for row in check(ours, item_files)}


def test_every_task_of_ours_renders_a_prompt(rows):
    assert {name: row["reason"] for name, row in rows.items() if row["status"] == "broken"} == {}
    assert all(row["request"] for row in rows.values() if row["status"] != "unavailable")


def test_prompts_look_as_their_protocols_say(rows):
    assert rows["hcx_hellaswag_letters"]["request"].endswith("\nD. flies home.\nAnswer:")
    assert rows["hcx_infill_single_line_spm"]["request"].endswith("<|fim_middle|>def add_one(x):\n")
    assert rows["hcx_flores_ja_ko"]["request"].endswith("Japanese: 雨が降る 0\nKorean:")
    assert "The answer is 5." in rows["hcx_gsm8k_maj8"]["request"]


@pytest.mark.slow  # lm-eval indexes its own thousands of task files first
def test_every_task_of_lm_eval_that_the_registry_names_is_there():
    names = run.lm_eval_names()
    wanted = {c.benchmark.lm_eval for c in task_cards().values() if c.benchmark and c.benchmark.lm_eval}
    assert wanted <= names
    assert {name for c in task_cards().values() if c.benchmark for name in c.benchmark.exclude} <= names


BROKEN = """
task: hcx_broken
dataset_path: allenai/ai2_arc
test_split: test
output_type: multiple_choice
num_fewshot: 0
process_docs: !function hcx.evals.letters.{function}
doc_to_text: "{{{{question}}}}"
doc_to_choice: !function hcx.evals.letters.plain_letters
doc_to_target: !function hcx.evals.scoring.gold
metadata: {{version: 1.0, suite: demo, language: en, category: knowledge, source: hub, protocol: "a test"}}
"""


@pytest.mark.parametrize(
    ("function", "reason"),
    [("no_such_function", "no_such_function"), ("piqa", "not of the expected schema"), ("arc", "")],
)
def test_a_task_that_lm_eval_would_skip_is_reported_as_broken(tmp_path, monkeypatch, function, reason):
    (tmp_path / "hcx_broken.yaml").write_text(BROKEN.format(function=function))
    for module in (catalog, loading):
        monkeypatch.setattr(module, "tasks_directory", lambda: tmp_path)
    (row,) = check(["hcx_broken"])
    if reason:
        assert row["status"] == "broken"
        assert reason in row["reason"]
    else:
        assert row["status"] == "needs-data"
    assert run.is_healthy([row]) is (not reason)


def test_a_lookup_on_the_hub_that_no_task_needs_is_not_reported_and_errors_are(caplog):
    registry = logging.getLogger("lm_eval.api.registry")
    with loading.quiet_lm_eval():
        assert datasets.are_progress_bars_disabled()
        registry.error("f1 not found in the evaluate library! Please check it")
        registry.error("something else")
    registry.error("f1 not found in the evaluate library! Please check it")
    assert [record.getMessage()[:14] for record in caplog.records] == ["something else", "f1 not found i"]
