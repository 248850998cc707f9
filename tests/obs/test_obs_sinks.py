"""The JSONL file is the truth: one row per step, whatever was interrupted; wandb mirrors it under one id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hcx.errors import DataError
from hcx.obs import JsonlSink, TrackingConfig, make_sinks, read_jsonl


def test_torn_last_line_is_cut_when_the_file_is_reopened(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(1, {"train/loss": 2.0})
    sink.close()
    with open(path, "a") as file:
        file.write('{"step": 2, "train/lo')
    sink = JsonlSink(path)
    sink.write(2, {"train/loss": 1.5})
    sink.close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]


def test_rows_beyond_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2, 3):
        sink.write(step, {"train/loss": float(step)})
    sink.close()
    sink = JsonlSink(path, resume_step=1)
    sink.write(2, {"train/loss": 20.0})
    sink.close()
    assert [(row["step"], row["train/loss"]) for row in read_jsonl(path)] == [(1, 1.0), (2, 20.0)]


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(DataError, match=r":2: not a JSON line"):
        list(read_jsonl(path))


def test_going_back_drops_later_metrics_and_keeps_events(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        sink.write(step, {"train/loss": 1.0})
    sink.event(3, "bad_step", {"samples": [[8, 12]], "loss": float("nan")})
    sink.rewind(1)
    sink.write(2, {"train/loss": 2.0})
    sink.close()
    rows = list(read_jsonl(tmp_path / "m.jsonl"))
    assert [(row["step"], row.get("event")) for row in rows] == [(1, None), (3, "bad_step"), (2, None)]
    assert rows[1]["samples"] == [[8, 12]]
    assert rows[1]["loss"] == "nan"
    JsonlSink(tmp_path / "m.jsonl", resume_step=0).close()
    assert [row.get("event") for row in read_jsonl(tmp_path / "m.jsonl")] == ["bad_step"]


def test_non_finite_values_stay_valid_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write(1, {"train/loss": float("nan")})
    sink.close()
    assert json.loads((tmp_path / "m.jsonl").read_text())["train/loss"] == "nan"


def test_offline_wandb_keeps_one_run_id_across_restarts(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for start in (1, 3):
        sinks = make_sinks(tmp_path, TrackingConfig(wandb="offline"), {"seed": 1})
        for sink in sinks:
            sink.write(start, {"train/loss": 1.0})
            sink.close()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    run_id = (tmp_path / "wandb_run_id").read_text()
    # Both starts may fall into one second: the second folder then gets a number behind the id.
    files = [file.name for folder in folders for file in folder.glob("*.wandb")]
    assert files == [f"run-{run_id}.wandb"] * 2


SIGNALLED = """
import os, signal, sys, time
from pathlib import Path
from hcx.obs import TrackingConfig
from hcx.obs.sinks import make_sinks

def children():
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            yield int(status.parent.name)

sinks = make_sinks(sys.argv[1], TrackingConfig(wandb="offline"), {})
services = list(children())
assert services
for sink in sinks:
    sink.write(1, {"train/loss": 1.0})
for service in services:
    os.kill(service, getattr(signal, sys.argv[2]))
time.sleep(1.0)
for step in (2, 3):
    for sink in sinks:
        sink.write(step, {"train/loss": 1.0})
for sink in sinks:
    sink.close()
print("went on")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds wandb's service in /proc")
@pytest.mark.parametrize(("name", "mirrored"), [("SIGTERM", False), ("SIGUSR1", True), ("SIGKILL", False)])
def test_what_ends_the_mirror_does_not_end_the_run(tmp_path: Path, name: str, mirrored: bool) -> None:
    """SLURM signals every process of a step when it wants a run to save; wandb's service is one."""
    pytest.importorskip("wandb")
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path), name]
    # With a service of its own, whatever another test has left running.
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "went on" in done.stdout
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert ("wandb has stopped" in done.stderr) is not mirrored
