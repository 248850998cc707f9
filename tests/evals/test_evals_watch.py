"""One result for each checkpoint, whoever is killed when."""

import os
import subprocess
import sys

import pytest

from hcx.artifacts import is_complete, new_artifact
from hcx.errors import EvalError
from hcx.evals.watch import claimed, evaluate_new, saved_checkpoints, watch


def checkpoint(run, step):
    with new_artifact(run / "checkpoints" / f"step-{step:06d}", "checkpoint", {"step": step}) as writer:
        (writer.path / "state").write_text(str(step))


def evaluate(source, result):
    with new_artifact(result, "eval", {}) as writer:
        (writer.path / "results.json").write_text((source / "state").read_text())


@pytest.fixture
def run(tmp_path):
    for step in (100, 20):
        checkpoint(tmp_path / "run", step)
    return tmp_path / "run"


def test_checkpoints_are_evaluated_once_in_their_order(run, tmp_path):
    assert evaluate_new(run, tmp_path / "out", evaluate) == ["step-000020", "step-000100"]
    assert evaluate_new(run, tmp_path / "out", evaluate) == []
    checkpoint(run, 200)
    assert evaluate_new(run, tmp_path / "out", evaluate) == ["step-000200"]


def test_a_checkpoint_that_is_still_written_is_not_taken(run):
    (run / "checkpoints" / "step-000300").mkdir()
    (run / "checkpoints" / "step-000300" / "state").write_text("half")
    assert [path.name for path in saved_checkpoints(run)] == ["step-000020", "step-000100"]


KILLED = """
import os, sys
from pathlib import Path
from hcx.artifacts import new_artifact
from hcx.evals.watch import evaluate_new
def evaluate(source, result):
    with new_artifact(result, "eval", {}) as writer:
        (writer.path / "results.json").write_text("half of it")
        os.kill(os.getpid(), 9)
evaluate_new(Path(sys.argv[1]), Path(sys.argv[2]), evaluate)
"""


def test_a_consumer_killed_in_the_middle_neither_loses_nor_doubles_a_result(run, tmp_path):
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, run, out], timeout=120)
    assert ended.returncode == -9
    assert not is_complete(out / "step-000020")
    assert evaluate_new(run, out, evaluate) == ["step-000020", "step-000100"]
    assert (out / "step-000020" / "results.json").read_text() == "20"
    assert [path.name for path in sorted(out.glob("step-*")) if is_complete(path)] == ["step-000020", "step-000100"]


def test_two_consumers_never_evaluate_the_same_checkpoint(run, tmp_path):
    out = tmp_path / "out"
    with claimed(out, "step-000020") as mine:
        assert mine
        descriptor = os.open(out / ".step-000020.lock", os.O_RDWR)
        os.close(descriptor)
        with claimed(out, "step-000020") as theirs:
            assert not theirs
        assert evaluate_new(run, out, evaluate) == ["step-000100"]
    assert evaluate_new(run, out, evaluate) == ["step-000020"]


def test_an_evaluation_that_fails_is_tried_again(run, tmp_path):
    def failing(source, result):
        raise EvalError("no data")

    with pytest.raises(EvalError, match="no data"):
        evaluate_new(run, tmp_path / "out", failing)
    assert len(evaluate_new(run, tmp_path / "out", evaluate)) == 2


def test_watching_ends_after_the_last_checkpoint(run, tmp_path):
    states = iter([False, True])

    def finished():
        state = next(states)
        # Saved after the look that found the run unfinished: the last look must still see it.
        if state:
            checkpoint(run, 300)
        return state

    watch(run, tmp_path / "out", evaluate, poll_s=0, finished=finished)
    assert is_complete(tmp_path / "out" / "step-000300")


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(EvalError, match="no such folder"):
        saved_checkpoints(tmp_path / "nowhere")
