"""A run that is killed again and again ends with the losses, samples and weights of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hcx.config import dump_yaml
from hcx.engine.config import DeepSpeedEngineConfig
from hcx.obs import read_jsonl
from hcx.optim import OptimConfig
from hcx.recipe import DataSection, TrainRecipe, ValidationSection
from hcx.testing.lives import Lives
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_config
from hcx.train import CheckpointReader, TrainerConfig, find_checkpoint, read_ledger
from hcx.train.checkpoint import checkpoints


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_shards(tmp_path_factory.mktemp("text")).directory)


def recipe(shards: str, out: Path, steps: int, **train: Any) -> TrainRecipe:
    return TrainRecipe(
        name="kills",
        out=str(out),
        model=tiny_config(vocab_size=512, tie_embeddings=True, initializer_range=0.02),
        data=DataSection(shards=shards, seq_len=32),
        train=TrainerConfig(
            **{"steps": steps, "global_batch": 4, "micro_batch": 2, "validate_every": 0, "checkpoint_every": 2, **train}
        ),
        optim=OptimConfig(lr=3e-3),
        validation=ValidationSection(max_documents=2),
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    """What a step computed, of every step."""
    keep = ("step", "train/", "data/share")
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "train/loss" in row]
    return [{key: value for key, value in row.items() if key.startswith(keep)} for row in rows]


def assert_same_run(out: Path, straight: Path, steps: int) -> None:
    """Bit for bit: metrics, the ledger with losses and samples, masters and optimizer state, the exported model."""
    assert metrics(out) == metrics(straight)
    assert [row["step"] for row in metrics(out)] == list(range(1, steps + 1))
    one, two = (find_checkpoint(path / "checkpoints") for path in (out, straight))
    assert one is not None
    assert two is not None
    assert one.step == two.step == steps
    ledger = read_ledger(one.directory)
    assert ledger == read_ledger(two.directory)
    assert [row["samples"] for row in ledger] == [[[4 * step, 4 * step + 4]] for step in range(steps)]
    for name in two.names():
        for key in two.keys(name):
            assert torch.equal(one.read(name, key), two.read(name, key)), (name, key)
    assert (out / "model" / "model.safetensors").read_bytes() == (straight / "model" / "model.safetensors").read_bytes()


def kill_and_compare(shards: str, tmp_path: Path, steps: int, kills: int, seed: int) -> Lives:
    lives = Lives()
    assert lives.live(recipe(shards, tmp_path / "straight", steps)) == 0
    # Lives that write on a thread and lives that wait take turns: the checkpoints are the same.
    recipes = [
        recipe(shards, tmp_path / "killed", steps, checkpoint_async=thread) for thread in (True, True, False, False)
    ]
    lives.until_done(recipes, kills, seed)
    assert_same_run(tmp_path / "killed", tmp_path / "straight", steps)
    return lives


def test_five_kills_change_nothing(shards: str, tmp_path: Path) -> None:
    assert kill_and_compare(shards, tmp_path, steps=120, kills=5, seed=0).kills == 5


@pytest.mark.slow
def test_twenty_kills_change_nothing(shards: str, tmp_path: Path) -> None:
    lives = kill_and_compare(shards, tmp_path, steps=600, kills=20, seed=1)
    assert lives.kills == 20
    # About half of them are aimed there.
    assert lives.in_saves >= 5


def test_a_signal_saves_and_ends_as_resumable(shards: str, tmp_path: Path) -> None:
    steps = 40
    lives = Lives()
    assert lives.live(recipe(shards, tmp_path / "straight", steps, checkpoint_every=0)) == 0
    asked = recipe(shards, tmp_path / "asked", steps, checkpoint_every=0)
    file = tmp_path / "asked" / "metrics.jsonl"
    for number, rows in ((signal.SIGTERM, 5), (signal.SIGUSR1, 15)):

        def reached(rows: int = rows) -> bool:
            return file.exists() and file.read_bytes().count(b"train/loss") >= rows

        code = lives.live(asked, number, reached)
        assert code == os.EX_TEMPFAIL == 75
        reader = find_checkpoint(tmp_path / "asked" / "checkpoints")
        assert reader is not None
        assert rows <= reader.step < steps
    assert lives.live(asked) == 0
    assert_same_run(tmp_path / "asked", tmp_path / "straight", steps)


def test_the_command_answers_a_signal_with_75_and_damage_with_2(shards: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe(shards, tmp_path / "out", 400)), encoding="utf-8")
    command = [sys.executable, "-m", "hcx.cli.main", "train", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "checkpoints" / "step-000006").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 75, told
    kept = list((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert kept
    for path in kept:
        CheckpointReader(path, digests=True)
        file = path / "state-00000.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "state-00000.safetensors: missing or cut short" in refused.stderr
    assert "no checkpoint is whole" in refused.stderr
    assert "Traceback" not in refused.stderr
    # Nothing lost: what was there is there.
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    assert list((tmp_path / "out" / "checkpoints").glob("step-*")) == kept


def ranks_of(launcher: int) -> list[int]:
    """Process numbers of a launcher's children."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="utf-8")
    return [int(number) for number in found.split()]


def alive(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ranks die with their launcher on Linux only")
def test_two_ranks_that_are_killed_with_their_launcher_change_nothing(shards: str, tmp_path: Path) -> None:
    steps = 120
    engine = DeepSpeedEngineConfig(zero_stage=1, data_parallel=2)
    made = {name: recipe(shards, tmp_path / name, steps) for name in ("straight", "killed")}
    commands = {}
    for name, value in made.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump_yaml(value.model_copy(update={"engine": engine})), encoding="utf-8")
        commands[name] = [sys.executable, "-m", "hcx.cli.main", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(commands["straight"], env=environment, check=True, timeout=120, stderr=subprocess.DEVNULL)
    draw = random.Random(2)
    for life in range(2):
        launcher = subprocess.Popen(commands["killed"], env=environment, stderr=subprocess.DEVNULL)
        wanted = 20 + 40 * life
        while not any(step >= wanted for step, _ in checkpoints(tmp_path / "killed" / "checkpoints")):
            assert launcher.poll() is None
            time.sleep(0.001)
        ranks = ranks_of(launcher.pid)
        assert len(ranks) == 2
        time.sleep(draw.uniform(0.0, 0.05))
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 5
        while any(alive(rank) for rank in ranks):
            assert time.monotonic() < deadline, "a rank outlives its launcher"
            time.sleep(0.01)
    subprocess.run(commands["killed"], env=environment, check=True, timeout=120, stderr=subprocess.DEVNULL)
    assert_same_run(tmp_path / "killed", tmp_path / "straight", steps)
    assert len(list((tmp_path / "killed" / "checkpoints" / f"step-{steps:06d}").glob("state-*"))) == 2
