"""From a model directory to results.json, and the command."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("sacrebleu")

from hcx.artifacts import read_manifest, verify
from hcx.errors import EvalError
from hcx.evals import check, evaluate
from hcx.evals.catalog import find_tasks
from hcx.evals.fetch import fetch
from hcx.evals.run import Chosen, _longest_answer, with_sentinels
from hcx.testing.evaluation import evaluable_directory

ALL = [
    "hcx_bpb_ko",
    "hcx_bpb_en",
    "hcx_bpb_code",
    "hcx_kmmlu_dev225",
    "hcx_mmlu_dev282",
    "hcx_translation_ko_en",
    "hcx_translation_en_ko",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return evaluable_directory(tmp_path_factory.mktemp("model"), max_seq_len=512)


@pytest.fixture(scope="module")
def run(model, item_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "eval"
    return out, evaluate(model, tasks=ALL, out=out, limit=10, data=item_files, batch_size=4)


def test_results_have_the_agreed_schema(run):
    out, results = run
    assert list(results["tasks"]) == ALL
    for name, task in results["tasks"].items():
        assert set(task) >= {"metrics", "language", "category", "version", "protocol", "samples"}
        for entry in task["metrics"].values():
            assert set(entry) >= {"value", "stderr", "interval", "n", "chance", "contains_chance"}
            low, high = entry["interval"]
            assert low <= entry["value"] <= high or name.startswith("hcx_translation")
            assert entry["stderr"] >= 0
    assert json.loads((out / "results.json").read_text()) == results
    from hcx.report.schema import EvalResults

    assert set(EvalResults.model_validate(results).tasks) == set(ALL)


def test_results_are_an_artifact_that_names_the_model_by_digest(run, model):
    out, results = run
    manifest = verify(out)
    assert manifest.kind == "eval"
    assert [entry.role for entry in manifest.inputs] == ["model"]
    assert manifest.inputs[0].digest == results["model_digest"]
    assert read_manifest(out).counts["tasks"] == len(ALL)


def test_samples_hold_one_row_per_item_from_which_the_score_can_be_recomputed(run):
    out, results = run
    rows = {
        name: [json.loads(line) for line in (out / task["samples"]).read_text().splitlines()]
        for name, task in results["tasks"].items()
    }
    documents = rows["hcx_bpb_ko"]
    assert results["tasks"]["hcx_bpb_ko"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(
        sum(row["bits"] for row in documents) / sum(row["bytes"] for row in documents)
    )
    questions = rows["hcx_kmmlu_dev225"]
    assert len(questions) == 10
    assert results["tasks"]["hcx_kmmlu_dev225"]["metrics"]["acc"]["value"] == pytest.approx(
        sum(row["chosen"] == row["gold"] for row in questions) / len(questions)
    )
    assert {"source", "reference", "output"} <= set(rows["hcx_translation_ko_en"][0])


def test_chance_is_one_over_the_number_of_options(run):
    _, results = run
    assert results["tasks"]["hcx_kmmlu_dev225"]["metrics"]["acc"]["chance"] == pytest.approx(0.25)
    assert results["tasks"]["hcx_mmlu_dev282"]["metrics"]["acc"]["chance"] == pytest.approx(0.2)
    assert results["tasks"]["hcx_bpb_ko"]["metrics"]["bits_per_byte"]["contains_chance"] is None


def test_scores_do_not_depend_on_the_batch_size(run, model, item_files):
    _, results = run
    again = evaluate(model, tasks=["hcx_bpb_ko", "hcx_kmmlu_dev225"], limit=10, data=item_files, batch_size=1)
    for name in again["tasks"]:
        for metric, entry in again["tasks"][name]["metrics"].items():
            assert entry["value"] == pytest.approx(results["tasks"][name]["metrics"][metric]["value"], rel=1e-5)


def test_bits_per_byte_equals_a_computation_of_its_own(model, item_files, run):
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, results = run
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    bits = size = 0.0
    for line in (item_files / "held_out_ko.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = reference(tokens[:, :-1]).logits.log_softmax(-1)
        bits -= float(logprobs.gather(2, tokens[:, 1:, None]).sum()) / math.log(2)
        size += len(text.encode())
    assert results["tasks"]["hcx_bpb_ko"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits / size, rel=1e-5)


def test_a_model_that_knows_the_answers_scores_far_above_chance_and_is_not_marked(model, item_files, monkeypatch):
    from hcx.evals.lm import HcxLM

    answers = dict(zip((f"{n}번째 도시는?" for n in range(12)), "ABCD" * 3, strict=True))

    def knows(self, requests, **_):
        right = [args[1].strip() == answers[args[0].splitlines()[0]] for args in (r.args for r in requests)]
        return [(0.0, True) if hit else (-9.0, False) for hit in right]

    monkeypatch.setattr(HcxLM, "loglikelihood", knows)
    entry = evaluate(model, tasks=["hcx_kmmlu_dev225"], data=item_files)["tasks"]["hcx_kmmlu_dev225"]["metrics"]["acc"]
    assert entry["value"] == 1.0
    assert entry["contains_chance"] is False


def test_a_model_that_guesses_is_marked(run):
    entry = run[1]["tasks"]["hcx_kmmlu_dev225"]["metrics"]["acc"]
    low, high = entry["interval"]
    assert entry["contains_chance"] is (low <= 0.25 <= high)


def test_a_result_directory_is_never_overwritten(run, model, item_files):
    out, _ = run
    with pytest.raises(Exception, match="already exists"):
        evaluate(model, tasks=["hcx_bpb_ko"], out=out, data=item_files)


def test_tasks_and_suite_together_are_refused(model):
    with pytest.raises(EvalError, match="not both"):
        evaluate(model, tasks=["hcx_bpb_ko"], suite="smoke")


def test_check_builds_one_request_of_each_task(item_files):
    rows = check(ALL, item_files)
    assert {row["name"] for row in rows} == set(ALL)
    assert all(row["status"] == "runs" and row["items"] and row["request"] for row in rows)


def test_a_task_of_a_suite_whose_answers_do_not_fit_the_model_is_left_out_with_the_reason(item_files, tmp_path):
    short = evaluable_directory(tmp_path / "short", max_seq_len=96)
    results = evaluate(short, suite="smoke", data=item_files)
    assert "hcx_bpb_ko" in results["tasks"]
    assert "the model 96" in results["skipped"]["hcx_translation_ko_en"]
    with pytest.raises(EvalError, match="96 tokens"):
        evaluate(short, tasks=["hcx_translation_ko_en"], data=item_files)


@pytest.mark.parametrize(("given", "expected"), [({"max_gen_toks": 7}, 7), ({"until": ["x"]}, 256), (None, 256)])
def test_a_task_that_does_not_say_how_long_its_answers_are_takes_as_many_tokens_as_lm_eval_gives(given, expected):
    task = SimpleNamespace(OUTPUT_TYPE="generate_until", config=SimpleNamespace(generation_kwargs=given))
    assert _longest_answer(task, None, SimpleNamespace(max_gen_toks=256)) == expected
    task.OUTPUT_TYPE = "loglikelihood_rolling"
    assert _longest_answer(task, None, SimpleNamespace(max_gen_toks=256)) == 0


def test_options_that_do_not_fit_the_model_are_found_out_before_the_work(tmp_path):
    short = evaluable_directory(tmp_path / "short", max_seq_len=96)
    begin = "\n\nHuman: Hi\n\nAssistant:"
    pair = {"chosen": f"{begin} {'No. ' * 400}", "rejected": f"{begin} Yes."}
    bundle = tmp_path / "bundle"
    (tmp_path / "files" / "hh_rlhf").mkdir(parents=True)
    (tmp_path / "files" / "hh_rlhf" / "harmless-base.test.jsonl").write_text(json.dumps(pair))
    fetch(["hcx_hh_harmless"], bundle, tmp_path / "files")
    with pytest.raises(EvalError, match=r"'hcx_hh_harmless': unavailable: answers take \d+ tokens, the model 96"):
        evaluate(short, tasks=["hcx_hh_harmless"], data=bundle)


def test_infilling_is_left_out_of_a_suite_where_the_tokenizer_has_no_tokens_for_it(tmp_path):
    chosen = [Chosen(card, None) for card in find_tasks(["hcx_bpb_ko", "hcx_infill_single_line_psm"])]
    tokens, skipped = tmp_path / "tokenizer.json", {}
    tokens.write_text('{"added_tokens": []}')
    assert with_sentinels(chosen, tmp_path, skipped, named=False) == chosen[:1]
    assert "no sentinels" in skipped["hcx_infill_single_line_psm"]
    # Asked for by name, it is loaded, and loading says why it cannot be measured.
    assert with_sentinels(chosen, tmp_path, {}, named=True) == chosen
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    tokens.write_text(json.dumps({"added_tokens": [{"content": name} for name in names]}))
    assert with_sentinels(chosen, tmp_path, {}, named=False) == chosen


def test_an_unknown_numerics_class_is_refused(model):
    with pytest.raises(EvalError, match="valid: exact, fast, reference"):
        evaluate(model, tasks=["hcx_bpb_ko"], numerics="exat")


def hcx(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "hcx.cli.main", "eval", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_ends_with_a_table_of_intervals(model, item_files, tmp_path):
    answer = hcx(model, "--tasks", "hcx_kmmlu_dev225,hcx_bpb_en", "--data", item_files, "--out", tmp_path / "out")
    assert answer.returncode == 0, answer.stderr
    assert "95 % interval" in answer.stdout
    assert "hcx_kmmlu_dev225  acc" in answer.stdout
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert "Traceback" not in answer.stderr


def test_an_unknown_task_is_the_users_to_mend(model, tmp_path):
    answer = hcx(model, "--tasks", "hcx_bpb_kr", "--out", tmp_path / "out")
    assert answer.returncode == 2
    assert "did you mean 'hcx_bpb_ko'" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "out").exists()


def test_every_shipped_task_finds_its_shipped_items():
    rows = {row["name"]: row for row in check(ALL)}
    assert {row["status"] for row in rows.values()} == {"runs"}
    assert (rows["hcx_kmmlu_dev225"]["items"], rows["hcx_mmlu_dev282"]["items"]) == (225, 282)
    assert rows["hcx_bpb_ko"]["items"] >= 50
    assert rows["hcx_bpb_en"]["items"] >= 50
    assert rows["hcx_translation_ko_en"]["items"] >= 500
    assert rows["hcx_translation_en_ko"]["request"].endswith("\nKorean:")
