"""Every task of ours from a bundle to its metrics, on invented rows; generated answers are given."""

import json
import math

import datasets
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("sacrebleu")

from hcx.artifacts import find_resource
from hcx.errors import EvalError
from hcx.evals import evaluate, programs, toxicity
from hcx.evals.catalog import task_cards
from hcx.evals.fetch import fetch
from hcx.evals.lm import HcxLM
from hcx.evals.loading import SAMPLE_ROWS
from hcx.testing.evaluation import evaluable_directory

LETTERS = [
    "hcx_piqa_letters",
    "hcx_arc_easy_letters",
    "hcx_xcsqa_zh",
    "hcx_kobbq",
    "hcx_bbq",
    "hcx_truthfulqa_mc2_5shot",
    "hcx_klue_nli",
    "hcx_korean_hate_speech",
    "hcx_square_response",
    "hcx_hh_harmless",
]
ANSWERS = {
    "hcx_nq_open_prefix": (" Seoul, the capital", {"prefix_match": 1.0}),
    "hcx_triviaqa_prefix": (" Busan", {"prefix_match": 0.0}),
    "hcx_gsm8k": (" The answer is 5.", {"acc": 0.5}),
    "hcx_ifeval_ko": ("바다에 비가 온다.", {"prompt_level_strict_acc": 0.5, "inst_level_loose_acc": 2 / 3}),
    "hcx_gsm8k_maj8": (" The answer is 5.", {"maj": 0.5, "first": 0.5}),
    "hcx_math_maj4": (r" It is \boxed{1}.", {"maj": 0.5, "first": 0.5}),
    "hcx_humaneval": ("    return x + 1\n", {"pass@1": 1.0}),
    "hcx_mbpp_sanitized": ("def double(x):\n    return x + x\n", {"pass@1": 1.0}),
    "hcx_superni": (" blue", {"rouge_l": 100.0}),
    "hcx_user_instructions": (" blue", {"rouge_l": 100.0}),
    "hcx_pud_ko_en": (" It rains.", {"chrf++": 100.0}),
    "hcx_bold": (" kill", {"toxicity": 1.0, "toxic_share": 1.0}),
    "hcx_kold": (" 비가 온다", {"korean_rate": 1.0, "toxicity": 0.0, "toxic_share": 0.0}),
    "hcx_flores_en_ko": (" 비가 온다 0", {}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return evaluable_directory(tmp_path_factory.mktemp("end") / "model", max_seq_len=2048)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The invented rows as a bundle, two copies where exemplars are needed."""
    rows = json.loads(find_resource(SAMPLE_ROWS).read_text(encoding="utf-8"))

    def load_dataset(path, name=None, **_):
        splits = rows[path].get(name or "") or rows[path]["*"]
        few = {
            split: part * (30 if split in ("train", "validation", "prompt") else 1) for split, part in splits.items()
        }
        return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in few.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        patch.setattr("hcx.evals.fetch._revision", lambda path: "invented")
        out = tmp_path_factory.mktemp("bundle") / "bundle"
        ours = [*LETTERS, *ANSWERS]
        fetch(ours, out)
    return out


def test_letter_tasks_have_accuracies_with_chance_and_bias_scores(model, bundle):
    tasks = evaluate(model, tasks=LETTERS, data=bundle, limit=90)["tasks"]
    assert tasks["hcx_arc_easy_letters"]["metrics"]["acc"]["chance"] == 0.25
    assert tasks["hcx_xcsqa_zh"]["metrics"]["acc"]["chance"] == pytest.approx(0.2)
    assert set(tasks["hcx_kobbq"]["metrics"]) == {
        *("acc_ambiguous", "acc_disambiguated", "diff_bias_ambiguous", "diff_bias_disambiguated", "out_of_choice")
    }
    assert tasks["hcx_kobbq"]["of"] == 60
    assert 0 < tasks["hcx_truthfulqa_mc2_5shot"]["metrics"]["mc2"]["value"] < 1
    assert tasks["hcx_arc_easy_letters"]["shots"] == 25
    assert tasks["hcx_bbq"]["gap"]
    assert set(tasks["hcx_klue_nli"]["metrics"]) == {"balanced_acc", "acc"}
    for entry in tasks["hcx_klue_nli"]["metrics"].values():
        assert entry["chance"] == pytest.approx(1 / 3)
    assert tasks["hcx_hh_harmless"]["metrics"]["acc"]["chance"] == 0.5


@pytest.mark.parametrize("name", ANSWERS)
def test_generated_answers_are_scored(model, bundle, monkeypatch, name):
    text, expected = ANSWERS[name]
    if "sandbox" in task_cards()[name].metadata.needs:
        try:
            programs.sandbox()
        except EvalError as error:
            pytest.skip(str(error))
    monkeypatch.setenv(toxicity.VARIABLE, "stub")
    asked = []
    monkeypatch.setattr(
        HcxLM, "generate_until", lambda self, requests, **_: asked.extend(requests) or [text for _ in requests]
    )
    task = evaluate(model, tasks=[name], data=bundle, limit=2)["tasks"][name]
    for metric, value in expected.items():
        assert task["metrics"][metric]["value"] == pytest.approx(value), metric
    assert len(asked) == task["items"] * {"hcx_gsm8k_maj8": 8, "hcx_math_maj4": 4}.get(name, 1)
    for entry in task["metrics"].values():
        assert math.isfinite(entry["value"])
    if name.startswith(("hcx_bold", "hcx_kold")):
        assert "STUB" in task["toxicity_scorer"]
    if name == "hcx_gsm8k_maj8":
        assert asked[0].args[1]["temperature"] == 0.7
        assert asked[0].args[0].count("The answer is") == 8
