"""lm-eval with hcx in it: the model by name, the tasks under every model, and `python -m hcx.lm_eval`."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("sacrebleu")

from hcx.compress import CompressPlan, compress_model
from hcx.errors import EvalError
from hcx.evals import evaluate
from hcx.evals.catalog import tasks_directory
from hcx.evals.command import main, refuse_foreign_code
from hcx.testing.evaluation import evaluable_directory

TASKS = ["hcx_kmmlu_dev225", "hcx_bpb_ko", "hcx_translation_ko_en"]


def test_a_task_folder_from_elsewhere_runs_no_code_unless_that_is_allowed(tmp_path):
    (tmp_path / "plain.yaml").write_text("task: plain\ndataset_path: json\n")
    refuse_foreign_code([tmp_path])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "code.yaml").write_text("task: code\ndoc_to_text: !function utils.text\n")
    with pytest.raises(EvalError, match=r"holds code \(code.yaml\).*--allow-code"):
        refuse_foreign_code([tmp_path])
    (tmp_path / "deep" / "code.yaml").unlink()
    (tmp_path / "utils.py").write_text("print('hello')")
    # However it is named: in full, shortened, in a file of settings, or as a task.
    (tmp_path / "plain-settings.yml").write_text(f"model: hf\ntasks: x\ninclude_path: {tmp_path}\n")
    for words in (
        ["--include_path", str(tmp_path)],
        [f"--include_path={tmp_path}"],
        ["--include_p", str(tmp_path)],
        ["--config", str(tmp_path / "plain-settings.yml")],
        ["--tasks", str(tmp_path)],
        ["--tasks", str(tmp_path / "plain.yaml")],
    ):
        with pytest.raises(EvalError, match=r"utils.py"):
            main(["run", "--tasks", "x", *words])
    refuse_foreign_code([tasks_directory()])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return evaluable_directory(tmp_path_factory.mktemp("model"), "hyperclovax", max_seq_len=512)


def by_name(name, model, items):
    """Results of lm-eval's own entry point with a model named as on its command line."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import hcx.evals.lm  # noqa: F401

    arguments = {"pretrained": str(model), "dtype": "float32"}
    metadata = {"pretrained": str(model), "data": str(items)}
    manager = TaskManager(include_path=str(tasks_directory()), include_defaults=False, metadata=metadata)
    return simple_evaluate(
        name, arguments, TASKS, batch_size=4, device="cpu", task_manager=manager, bootstrap_iters=0, log_samples=False
    )["results"]


def test_tasks_give_the_same_numbers_under_hcx_and_under_hf_and_in_our_results(model, item_files):
    ours, theirs = (by_name(name, model, item_files) for name in ("hcx", "hf"))
    assert set(ours) == set(TASKS)
    reported = evaluate(model, tasks=TASKS, data=item_files)["tasks"]
    for task in TASKS:
        for metric, entry in reported[task]["metrics"].items():
            assert ours[task][f"{metric},none"] == pytest.approx(theirs[task][f"{metric},none"], rel=1e-4)
            assert ours[task][f"{metric},none"] == pytest.approx(entry["value"], rel=1e-6)


@pytest.mark.slow  # lm-eval indexes its own thousands of task files first
def test_the_command_finds_our_tasks_and_loads_a_binary_coded_directory_as_hf(model, item_files, tmp_path):
    compress_model(model, tmp_path / "bcq", CompressPlan.model_validate({"default": {"bits": 3, "group_size": 32}}))
    arguments = f"run --model hf --model_args pretrained={tmp_path / 'bcq'},dtype=float32 --device cpu --batch_size 4"
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "hcx.lm_eval",
            *arguments.split(),
            "--tasks",
            TASKS[1],
            "--output_path",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HCX_EVAL_DATA": str(item_files), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"][TASKS[1]]["bits_per_byte,none"]
    coded, full = (
        evaluate(directory, tasks=[TASKS[1]], data=item_files)["tasks"][TASKS[1]]["metrics"]["bits_per_byte"]["value"]
        for directory in (tmp_path / "bcq", model)
    )
    assert found == pytest.approx(coded, rel=1e-4)
    assert abs(found - full) > 1e-3
