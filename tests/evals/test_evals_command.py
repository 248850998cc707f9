"""`python -m hcx.lm_eval`: lm-eval's command with hcx in it."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")

from hcx.lm_eval import arguments_with_tasks
from hcx.testing.evaluation import evaluable_directory


def test_task_folder_is_added_unless_the_user_names_one():
    assert arguments_with_tasks(["run", "--tasks", "x"], "T") == ["run", "--tasks", "x", "--include_path", "T"]
    assert arguments_with_tasks(["--model", "hcx"], "T") == ["--model", "hcx", "--include_path", "T"]
    assert arguments_with_tasks(["run", "--include_path", "mine"], "T") == ["run", "--include_path", "mine"]
    assert arguments_with_tasks(["--help"], "T") == ["--help"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return evaluable_directory(tmp_path_factory.mktemp("model"), "hyperclovax", max_seq_len=512)


def run(model, name, items, out):
    environment = {**os.environ, "HCX_EVAL_DATA": str(items), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    arguments = f"run --model {name} --model_args pretrained={model},dtype=float32 --device cpu --batch_size 4"
    tasks = "--tasks hcx_kmmlu_dev225,hcx_bpb_ko,hcx_translation_ko_en --log_samples --output_path"
    answer = subprocess.run(
        [sys.executable, "-m", "hcx.lm_eval", *arguments.split(), *tasks.split(), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    (path,) = out.rglob("results_*.json")
    return json.loads(path.read_text())["results"]


def test_the_command_gives_the_same_numbers_for_hcx_and_for_hf(model, item_files, tmp_path):
    ours = run(model, "hcx", item_files, tmp_path / "hcx")
    theirs = run(model, "hf", item_files, tmp_path / "hf")
    assert set(ours) == {"hcx_kmmlu_dev225", "hcx_bpb_ko", "hcx_translation_ko_en"}
    for task in ours:
        for key, value in ours[task].items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs[task][key], rel=1e-4, nan_ok=True), (task, key)
