"""When one rank of a run ends, sleeps or goes wrong, all end with one reason and one exit code, or go on as one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hcx.config import dump_yaml
from hcx.dist import process_environment
from hcx.dist.spawn import outcome
from hcx.engine.config import TorchEngineConfig
from hcx.errors import PeerLost
from hcx.obs import read_jsonl
from hcx.optim import OptimConfig
from hcx.recipe import DataSection, TrainRecipe, ValidationSection
from hcx.testing.ranks import RankEnd, train_on_ranks
from hcx.testing.runs import small_trainer
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool
from hcx.train import CheckpointReader, TrainerConfig, find_checkpoint, read_ledger
from hcx.train.endings import is_lost_peer, one_ending, read_note

STEPS = 8
SAMPLE = 22
"""Of step 6 (samples 20 to 23), on rank 1, which has the second half of each step."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_shards(tmp_path_factory.mktemp("text")).directory)


def run(shards: str, directory: Path, fault: str, **train: Any) -> tuple[Path, list[RankEnd]]:
    """The run's directory, and how its two ranks ended."""
    recipe = TrainRecipe(
        name="endings",
        out=str(directory / "run"),
        model=tiny_config(vocab_size=512, tie_embeddings=True, initializer_range=0.02),
        data=DataSection(shards=shards, seq_len=32),
        train=TrainerConfig(
            **{"steps": STEPS, "global_batch": 4, "micro_batch": 2, "validate_every": 0, "checkpoint_every": 2, **train}
        ),
        optim=OptimConfig(lr=3e-3),
        engine=TorchEngineConfig(data_parallel=2),
        validation=ValidationSection(max_documents=2),
    )
    file = directory / "recipe.yaml"
    file.write_text(dump_yaml(recipe), encoding="utf-8")
    return directory / "run", train_on_ranks(file, fault, SAMPLE, directory)


def events(out: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(out / "metrics.jsonl") if row.get("event") == name]


def assert_resumable(out: Path) -> None:
    """The last checkpoint before the fault is whole, and nothing of a later one is taken for it."""
    reader = find_checkpoint(out / "checkpoints")
    assert reader is not None
    assert reader.step == 4
    CheckpointReader(reader.directory, digests=True)


def test_nan_on_one_rank_is_skipped_on_all_with_the_samples(shards: str, tmp_path: Path) -> None:
    out, ends = run(shards, tmp_path, "nan")
    assert [end.code for end in ends] == [0, 0], ends
    (event,) = events(out, "bad_step")
    assert (event["step"], event["action"], event["samples"]) == (6, "skip", [[20, 24]])
    newest = find_checkpoint(out / "checkpoints")
    assert newest is not None
    rows = {row["step"]: row for row in read_ledger(newest.directory)}
    assert list(rows) == list(range(1, STEPS + 1))
    assert [step for step, row in rows.items() if "no_update" in row] == [6]
    assert "not finite" in rows[6]["no_update"]
    # Rank 0 never saw the NaN itself, and both have the weights that come without the step.
    assert all(isinstance(rows[step]["loss"], float) for step in (7, 8))
    assert [row["event"] for row in read_jsonl(out / "metrics.jsonl") if "event" in row] == [
        "start",
        "bad_step",
        "finished",
    ]


def test_a_rank_that_sleeps_for_ever_is_named_with_its_stack_and_the_job_ends_with_75(
    shards: str, tmp_path: Path
) -> None:
    out, ends = run(shards, tmp_path, "sleeps", watchdog_s=1.5)
    assert [end.code for end in ends] == [75, 75], ends
    assert "rank 1 made no progress" in ends[1].log
    assert "while in step 6 (train.watchdog_s = 1.5)" in ends[1].log
    stack = (out / "stalls" / "rank-00001.txt").read_text(encoding="utf-8")
    assert stack.startswith("rank 1 (process ")
    assert "sleeps_for_ever" in stack
    waiting = out / "stalls" / "rank-00000.txt"
    assert not waiting.exists() or "sleeps_for_ever" not in waiting.read_text(encoding="utf-8")
    assert_resumable(out)


@pytest.mark.parametrize(
    ("fault", "codes", "told"),
    [
        ("killed", [75, -9], "another rank is gone without a word"),
        ("bad data", [2, 2], "shard 7 is damaged; copy it again"),
        ("mistake", [1, 1], "ZeroDivisionError: a mistake of ours"),
    ],
)
def test_the_rank_that_is_left_ends_for_the_reason_of_the_one_that_went(
    shards: str, tmp_path: Path, fault: str, codes: list[int], told: str
) -> None:
    out, ends = run(shards, tmp_path, fault)
    assert [end.code for end in ends] == codes, ends
    assert told in ends[0].log
    (event,) = events(out, "peer_lost" if fault == "killed" else "failed")
    assert told in event["reason"]
    note = read_note(out / "failures" / "rank-00001.txt")
    if fault == "killed":
        assert note is None
    else:
        assert note is not None
        assert note["code"] == codes[1]
        assert "rank 1 on " in ends[0].log
        # The first line is what batch files read.
        text = (out / "failures" / "rank-00001.txt").read_text(encoding="utf-8")
        assert text.splitlines()[0] == f"exit {codes[1]}"
    assert_resumable(out)


def test_ranks_with_different_software_end_with_2_and_leave_the_run_as_it_was(shards: str, tmp_path: Path) -> None:
    out, _ = run(shards, tmp_path, "killed")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    out, ends = run(shards, tmp_path, "other software")
    assert [end.code for end in ends] == [2, 2], ends
    for end in ends:
        assert "nodes run different software" in end.log
        assert "torch 1.0.0" in end.log
        assert "Traceback" not in end.log
    assert_resumable(out)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("codes", "ends"),
    [([0, 0], 0), ([75, -9], 75), ([-9, 75], 75), ([75, 1], 1), ([2, 75], 2), ([-9, -15], 75), ([-11, -9], 1)],
)
def test_a_job_on_one_machine_has_one_exit_code(codes: list[int], ends: int) -> None:
    assert outcome(codes) == ends


def test_a_lost_connection_is_told_from_a_mistake() -> None:
    gloo = "[/x/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1234"
    assert is_lost_peer(RuntimeError(gloo))
    assert is_lost_peer(dist.DistBackendError("NCCL communicator was aborted"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(ConnectionResetError("Connection reset by peer"))


def test_a_failing_accelerator_is_told_by_its_node_and_leaves_the_run_resumable(tmp_path: Path) -> None:
    told = f"rank 0 on {socket.gethostname()}: its accelerator failed"
    with pytest.raises(PeerLost, match=told), one_ending(tmp_path, 0, 1):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...")
    with pytest.raises(RuntimeError, match="device-side assert"), one_ending(tmp_path, 0, 1):
        raise RuntimeError("CUDA error: device-side assert triggered")
    assert list(tmp_path.iterdir()) == []


def _stopped_by_rank_1(directory: str) -> tuple[bool, int]:
    rank = process_environment()[0]
    calls = iter(range(100))
    engine = TorchEngineConfig(data_parallel=2)

    def stop() -> str | None:
        return "signal SIGTERM" if next(calls) == 3 and rank == 1 else None

    trainer = small_trainer(directory, steps=6, validate=False, engine=engine, micro_batch=1, stop=stop)
    result = trainer.run()
    trainer.engine.close()
    return result.finished, result.step


def test_a_signal_that_reaches_one_rank_alone_is_the_reason_in_the_log(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(_stopped_by_rank_1, 2, str(tmp_path)) == [(False, 3), (False, 3)]
    (event,) = events(tmp_path, "stopped")
    assert (event["step"], event["reason"]) == (3, "signal SIGTERM")
