"""On a real SLURM of two nodes: whatever ends a start of a run, the run ends as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hcx.config import dump_yaml
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.obs import TrackingConfig, read_jsonl
from hcx.optim import OptimConfig
from hcx.recipe import DataSection, TrainRecipe, ValidationSection
from hcx.testing.shards import tiny_shards
from hcx.testing.slurm import SlurmCluster
from hcx.testing.tiny import tiny_config
from hcx.train import TrainerConfig, find_checkpoint, read_ledger

pytestmark = pytest.mark.slurm
WAIT_S = 240.0
"""No single thing that a test waits for may take longer."""
STEPS = 240


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_shards(tmp_path_factory.mktemp("text")).directory)


def recipe(shards: str, out: Path, steps: int = STEPS, **values: Any) -> TrainRecipe:
    """Two replicas, one for each node; a step takes some hundredths of a second."""
    return TrainRecipe(
        name="recovery",
        out=str(out),
        model=tiny_config(vocab_size=512, tie_embeddings=True, initializer_range=0.02),
        data=DataSection(shards=shards, seq_len=64),
        train=TrainerConfig(
            steps=steps,
            global_batch=8,
            micro_batch=4,
            validate_every=0,
            checkpoint_every=5,
            watchdog_s=120.0,
        ),
        optim=OptimConfig(lr=3e-3),
        validation=ValidationSection(max_documents=2),
        **{"engine": TorchEngineConfig(data_parallel=2), **values},
    )


class Launched:
    """A run on the cluster, from the outside."""

    def __init__(self, cluster: SlurmCluster, recipe: TrainRecipe) -> None:
        self.cluster, self.recipe, self.out = cluster, recipe, Path(recipe.out)
        self.file = self.out.with_name(f"{self.out.name}.yaml")
        self.file.write_text(dump_yaml(recipe), encoding="utf-8")
        self.job = self.launch()

    def launch(self) -> int:
        """Submits by `hcx launch slurm`, the same words each time."""
        words = ["launch", "slurm", str(self.file), "--nodes", "2", "--profile", "local", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "hcx.cli.main", *words],
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.job = int(json.loads(done.stdout)["train"])
        return self.job

    @property
    def log(self) -> str:
        """All that the jobs of this run printed."""
        files = sorted(self.out.glob("slurm-train-*.out"), key=lambda file: file.stat().st_ctime)
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def rows(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        return list(read_jsonl(path)) if path.exists() else []

    def events(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows() if row.get("event") == name]

    def step(self) -> int:
        return max((row["step"] for row in self.rows() if "train/loss" in row), default=0)

    def state(self) -> str:
        return self.cluster.job(self.job).get("JobState", "")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited for {what}; job {self.cluster.job(self.job)}\n{self.log[-6000:]}")
            time.sleep(0.03)

    def until_step(self, step: int) -> None:
        """Of a start after the last one that was disturbed."""
        self.until(lambda: self.step() >= step and len(self.cluster.ranks(self.job)) == 2, f"step {step}")

    def until_started_again(self, starts: int) -> None:
        self.until(lambda: len(self.events("start")) > starts, f"start {starts + 1}")

    def finish(self) -> None:
        self.until(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), "the end")
        assert self.state() == "COMPLETED", self.log[-6000:]


def kill_a_rank(run: Launched, draw: random.Random) -> str:
    os.kill(run.cluster.ranks(run.job)[draw.randrange(2)], signal.SIGKILL)
    return "a rank was killed"


def cut_the_power(run: Launched, draw: random.Random) -> str:
    node = f"node{draw.randint(1, 2)}"
    run.cluster.power_cut(node)
    run.cluster.power_on(node)
    return ""  # the node of the batch script may be the one without power


def requeue(run: Launched, draw: random.Random) -> str:
    run.cluster.ask("scontrol", "requeue", str(run.job), check=True)
    return "SIGTERM: waiting for the ranks to save"


def reach_the_time_limit(run: Launched, draw: random.Random) -> str:
    """The shortest limit is a minute, and the controller looks twice a minute: the ranks are held still until then.

    SLURM lets stopped processes go on when it signals them.
    """
    hold(run)
    run.cluster.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=1", check=True)
    run.until(lambda: run.state() != "RUNNING", "the requeue")
    run.cluster.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=30", check=True)
    return "requeueing job"


def hold(run: Launched, number: int = signal.SIGSTOP) -> None:
    """Keeps ranks where they are, or lets them go on, while something takes its time."""
    for process in run.cluster.ranks(run.job).values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def preempt(run: Launched, draw: random.Random) -> str:
    wrapped = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    hold(run)
    before = run.log.count("CANCELLED AT")
    run.cluster.ask("sbatch", *wrapped, check=True)
    run.until(lambda: run.log.count("CANCELLED AT") > before, "the preemption")
    hold(run, signal.SIGCONT)
    return "interrupted and resumable (exit code 75; the job is RUNNING)"


DISTURBANCES = {
    "rank killed": kill_a_rank,
    "power cut": cut_the_power,
    "requeue": requeue,
    "time limit": reach_the_time_limit,
    "preemption": preempt,
}
LEAVES_WORD = {"requeue": "signal SIGTERM", "time limit": "signal SIGUSR1", "preemption": "signal SIGTERM"}


def disturb(run: Launched, name: str, at: int, draw: random.Random) -> None:
    """One event at a step or a little after it; returns when the run has started again, and has said why it had to."""
    run.until_step(at)
    time.sleep(draw.uniform(0.0, 0.3))
    starts, before = len(run.events("start")), len(run.log)
    assert run.state() == "RUNNING", f"the run was over before the {name}: give it more steps"
    said = DISTURBANCES[name](run, draw)
    run.until_started_again(starts)
    assert said in run.log[before:]
    last = run.events("start")[-1]
    assert last["attempt"] == starts + 1
    assert last["nodes"] == "node[1-2]"
    assert LEAVES_WORD.get(name, "") in last["previous"]
    assert LEAVES_WORD.get(name) or last["previous"].startswith(("ended without a word", "peer_lost"))


def straight(recipe: TrainRecipe) -> Path:
    """The run without SLURM and without disturbance."""
    out = Path(recipe.out)
    file = out.with_name(f"{out.name}.yaml")
    file.write_text(dump_yaml(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "hcx.cli.main", "train", str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "train/loss" in row]
    return [{key: value for key, value in row.items() if key.startswith(("step", "train/", "data/"))} for row in rows]


def assert_same_run(out: Path, reference: Path, steps: int) -> None:
    """Bit for bit: losses, samples, masters, optimizer state, the exported model."""
    assert metrics(out) == metrics(reference)
    assert [row["step"] for row in metrics(out)] == list(range(1, steps + 1))
    one, two = (find_checkpoint(path / "checkpoints") for path in (out, reference))
    assert one is not None
    assert two is not None
    assert one.step == two.step == steps
    ledger = read_ledger(one.directory)
    assert ledger == read_ledger(two.directory)
    assert [row["samples"] for row in ledger] == [[[8 * step, 8 * step + 8]] for step in range(steps)]
    for name in two.names():
        for key in two.keys(name):
            assert torch.equal(one.read(name, key), two.read(name, key)), (name, key)
    assert (out / "model" / "model.safetensors").read_bytes() == (
        reference / "model" / "model.safetensors"
    ).read_bytes()


def test_a_run_that_meets_every_disturbance_ends_as_one_that_meets_none(
    cluster: SlurmCluster, shards: str, tmp_path: Path
) -> None:
    reference = straight(recipe(shards, tmp_path / "straight"))
    run = Launched(cluster, recipe(shards, tmp_path / "disturbed"))
    draw = random.Random(0)
    for number, name in enumerate(DISTURBANCES):
        disturb(run, name, 12 + 30 * number, draw)
    # scancel ends it in a state that the same command resumes; meanwhile the run is not to be launched twice.
    run.until_step(12 + 30 * len(DISTURBANCES))
    hold(run)
    with pytest.raises(AssertionError, match="trains this run already"):
        run.launch()
    hold(run, signal.SIGCONT)
    cancelled = run.job
    cluster.ask("scancel", str(cancelled), check=True)
    run.until(lambda: run.state() == "CANCELLED", "the cancelled job")
    saved = find_checkpoint(run.out / "checkpoints")
    assert saved is not None
    assert saved.step >= 12 + 30 * len(DISTURBANCES) - 5
    assert run.launch() != cancelled
    run.finish()
    assert cluster.job(cancelled)["JobState"] == "CANCELLED"
    assert run.events("start")[-1]["previous"] == "stopped: signal SIGTERM"
    assert run.events("finished")
    assert_same_run(run.out, reference, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTURBANCES)
def test_five_times_at_random_moments(cluster: SlurmCluster, shards: str, tmp_path: Path, name: str) -> None:
    steps = 480
    reference = straight(recipe(shards, tmp_path / "straight", steps))
    tracked = {"tracking": TrackingConfig(wandb="offline")} if name == "requeue" else {}
    run = Launched(cluster, recipe(shards, tmp_path / "disturbed", steps, **tracked))
    draw = random.Random(name)
    moments = sorted(draw.sample(range(2, steps - 60), 5))
    for moment in moments:
        disturb(run, name, max(moment, run.step() + 1), draw)
    run.finish()
    assert len(run.events("start")) == 6
    assert_same_run(run.out, reference, steps)
    if tracked:
        # Offline: a folder for each start, all of one run.
        run_id = (run.out / "wandb_run_id").read_text(encoding="utf-8")
        files = {file.name for file in (run.out / "wandb").glob("offline-run-*/*.wandb")}
        assert files == {f"run-{run_id}.wandb"}
        assert len(list((run.out / "wandb").glob("offline-run-*"))) == 6


ENGINES = {
    "deepspeed": DeepSpeedEngineConfig(zero_stage=1, data_parallel=2),
    "megatron": MegatronEngineConfig(tensor_parallel=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_every_engine_meets_over_nodes_and_survives(
    cluster: SlurmCluster, shards: str, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip(kind)
    steps = 60
    reference = straight(recipe(shards, tmp_path / "straight", steps, engine=ENGINES[kind]))
    run = Launched(cluster, recipe(shards, tmp_path / "disturbed", steps, engine=ENGINES[kind]))
    draw = random.Random(kind)
    disturb(run, "rank killed", 7, draw)
    disturb(run, "preemption", 25, draw)
    run.finish()
    assert_same_run(run.out, reference, steps)
