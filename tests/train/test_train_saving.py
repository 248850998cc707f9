"""A save that is cut anywhere leaves an earlier or a later whole checkpoint, and damage has a name."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hcx.artifacts import NewerFormat
from hcx.artifacts.tensors import write_safetensors
from hcx.engine.config import DeepSpeedEngineConfig
from hcx.errors import CheckpointError
from hcx.obs import read_jsonl
from hcx.testing import seam
from hcx.testing.runs import small_trainer, weights_of
from hcx.testing.workers import WorkerPool
from hcx.train import CheckpointReader, CheckpointSaver, Trainer, find_checkpoint, latest_checkpoint, save_checkpoint
from hcx.train.writing import snapshot

CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir")
"""What changes a disk; a kill or an error is put before each of them, in turn."""


@contextmanager
def before_call(directory: Path, number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Runs `act` before the `number`-th call that changes the disk; yields a list of the one count of calls."""
    count = [0]
    real = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and not args[1] & os.O_WRONLY
            if not reads:
                count[0] += 1
                if count[0] == number:
                    act()
            return real[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    try:
        yield count
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer after its run: an engine with state, and a checkpoint of step 1."""
    trainer = small_trainer(tmp_path_factory.mktemp("trained"), steps=1, validate=False)
    trainer.run()
    return trainer


def saver(directory: Path, **options: Any) -> CheckpointSaver:
    return CheckpointSaver(directory, keep=1, **options)


def copy_of(trained: Trainer, directory: Path) -> Path:
    """The run's checkpoints, to be written into."""
    shutil.copytree(trained.directory / "checkpoints", directory / "checkpoints")
    return directory / "checkpoints"


def in_child(work: Callable[[], object]) -> int:
    """Runs `work` in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def assert_one_whole(checkpoints: Path, steps: tuple[int, ...]) -> int:
    """Something can be resumed from, all that can be selected is whole, and a later save is not in the way."""
    for path in checkpoints.glob("step-*"):
        if (path / "manifest.json").exists():
            CheckpointReader(path, digests=True)
    reader = find_checkpoint(checkpoints)
    assert reader is not None
    assert reader.step in steps
    return reader.step


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_before_any_call_to_the_disk_leaves_a_whole_checkpoint(
    trained: Trainer, tmp_path: Path, asynchronous: bool
) -> None:
    number, seen = 0, set()
    while True:
        number += 1
        checkpoints = copy_of(trained, tmp_path / f"{number}")

        def save(number: int = number, checkpoints: Path = checkpoints) -> None:
            chosen = saver(checkpoints, asynchronous=asynchronous)
            with before_call(checkpoints, number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                chosen.begin(2, trained.engine, {"tokens": 2})
                chosen.finish()

        status = in_child(save)
        seen.add(assert_one_whole(checkpoints, (1, 2)))
        if not os.WIFSIGNALED(status):
            break
        assert save_checkpoint(checkpoints, 3, trained.engine, {}).is_dir()
        assert not list(checkpoints.glob(".step-*"))
    # Every stage was cut: some kills left the old checkpoint, some came after the new one was there.
    assert number > 20
    assert seen == {1, 2}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_of_any_call_to_the_disk_is_told_and_leaves_a_whole_checkpoint(
    trained: Trainer, tmp_path: Path, asynchronous: bool
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a full disk")

    number, told = 0, 0
    while True:
        number += 1
        checkpoints = copy_of(trained, tmp_path / f"{number}")
        chosen = saver(checkpoints, asynchronous=asynchronous)
        with before_call(checkpoints, number, full) as count:
            outcome = chosen.begin(2, trained.engine, {}) or chosen.finish()
        assert outcome is not None
        step = assert_one_whole(checkpoints, (1, 2))
        if outcome.path is None:
            told += 1
            assert step == 1
            assert "No space left on device" in str(outcome.problem)
        else:
            assert step == 2
        if count[0] < number:
            break
    assert told > 10


@pytest.mark.parametrize("exchange", [True, False])
def test_a_step_that_is_saved_again_replaces_the_checkpoint_at_once(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr("hcx.artifacts.durable._exchange", lambda one, other: False)
    checkpoints = copy_of(trained, tmp_path)
    number = 0
    while True:
        number += 1

        def save(number: int = number) -> None:
            with before_call(checkpoints, number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                saver(checkpoints).begin(1, trained.engine, {"tokens": number})

        status = in_child(save)
        if exchange:
            assert assert_one_whole(checkpoints, (1,)) == 1
        if not os.WIFSIGNALED(status):
            break
    assert CheckpointReader(checkpoints / "step-000001", digests=True).trainer_state["tokens"] == number
    assert not list(checkpoints.glob(".step-*"))


def test_a_thread_writes_the_same_bytes_as_waiting_does(trained: Trainer, tmp_path: Path) -> None:
    for name, asynchronous in (("waited", False), ("thread", True)):
        chosen = saver(tmp_path / name, asynchronous=asynchronous)
        chosen.begin(2, trained.engine, {"tokens": 7}, {"seed": 1})
        chosen.finish()
    one, two = (tmp_path / name / "step-000002" for name in ("waited", "thread"))
    for file in ("state-00000.safetensors", "index.json", "trainer.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (one, two)]
    for manifest in manifests:
        # The time of writing, and the seal that covers it.
        del manifest["created"], manifest["seal"]
    assert manifests[0] == manifests[1]


def test_steps_go_on_while_a_thread_writes_and_do_not_change_what_is_written(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(20)
        return write_safetensors(*args, **kwargs)

    monkeypatch.setattr("hcx.train.writing.write_safetensors", slow)
    before = weights_of(trained)
    chosen = saver(tmp_path, asynchronous=True)
    assert chosen.begin(2, trained.engine, {}) is None
    assert chosen.pending
    with pytest.raises(ValueError, match="still in flight"):
        chosen.begin(3, trained.engine, {})
    trained.engine.edit_masters(list(before), lambda name, master, state: master + 1.0)
    assert latest_checkpoint(tmp_path) is None
    gate.set()
    chosen.finish()
    reader = CheckpointReader(tmp_path / "step-000002")
    for name, tensor in before.items():
        assert torch.equal(reader.read(name, "master"), tensor)
    trained.engine.edit_masters(list(before), lambda name, master, state: before[name])


def test_an_abandoned_save_leaves_nothing_to_select(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = saver(tmp_path, asynchronous=True)
    entered, gate = threading.Event(), threading.Event()

    class Held(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> Any:
            entered.set()
            assert gate.wait(20)
            return super().__getitem__(name)

    def held_snapshot(*args: Any, **kwargs: Any) -> Any:
        tensors, entries = snapshot(*args, **kwargs)
        return Held(tensors), entries

    monkeypatch.setattr("hcx.train.saving.snapshot", held_snapshot)
    chosen.begin(2, trained.engine, {})
    assert entered.wait(20)
    threading.Timer(0.1, gate.set).start()
    chosen.close(abandon=True)
    assert not chosen.in_flight
    assert latest_checkpoint(tmp_path) is None
    monkeypatch.undo()
    assert save_checkpoint(tmp_path, 2, trained.engine, {}).is_dir()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_lets_the_run_go_on_with_the_last_good_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = iter(range(100))

    def stop() -> str | None:
        # After the first checkpoint no file may grow to the size of a state, and at the end it may again.
        step = next(calls)
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return None

    trainer = small_trainer(
        tmp_path, steps=6, stop=stop, checkpoint_every=2, checkpoint_async=asynchronous, keep_checkpoints=0
    )
    try:
        assert trainer.run().finished
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "last-good.json",
        "step-000002",
        "step-000006",
    ]
    (event,) = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row.get("event") == "checkpoint_failed"]
    assert event["step"] == 4
    assert "File too large" in event["problem"]


def test_a_full_disk_ends_the_run_by_option_and_at_its_end(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, options in (("stop", {"checkpoint_errors": "stop", "checkpoint_every": 2}), ("end", {})):
        trainer = small_trainer(tmp_path / name, steps=4, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(
                CheckpointError, match="step 2 was not written" if name == "stop" else "of step 4, cannot"
            ):
                trainer.run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert latest_checkpoint(tmp_path / name / "checkpoints") is None


def test_a_read_only_directory_is_told_and_holds_no_checkpoint(trained: Trainer) -> None:
    directory = Path(tempfile.mkdtemp())
    try:
        directory.chmod(0o555)

        def save() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)  # permissions do not bind root
            outcome = saver(directory / "checkpoints").begin(2, trained.engine, {})
            os._exit(7 if outcome is not None and "Permission denied" in str(outcome.problem) else 1)

        assert os.waitstatus_to_exitcode(in_child(save)) == 7
        assert list(directory.iterdir()) == []
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("file", ["state-00000.safetensors", "index.json", "trainer.json", "manifest.json"])
def test_one_flipped_byte_is_named(trained: Trainer, tmp_path: Path, file: str) -> None:
    checkpoints = copy_of(trained, tmp_path)
    path = checkpoints / "step-000001" / file
    data = path.read_bytes()
    for place in range(len(data) // 7, len(data), max(1, len(data) // 9)):
        if data[place : place + 1].isspace():
            continue  # between two JSON values it says nothing
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(
            (CheckpointError, NewerFormat), match=rf"step-000001.*{file}" if file != "manifest.json" else "step-000001"
        ):
            find_checkpoint(checkpoints)
    path.write_bytes(data)
    assert find_checkpoint(checkpoints) is not None


def test_a_damaged_checkpoint_is_passed_over_and_a_newer_format_is_not(trained: Trainer, tmp_path: Path) -> None:
    checkpoints = copy_of(trained, tmp_path)
    newer = save_checkpoint(checkpoints, 2, trained.engine, {})
    state = newer / "state-00000.safetensors"
    data = state.read_bytes()
    state.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = find_checkpoint(checkpoints)
    assert found is not None
    assert found.step == 1
    state.write_bytes(data)
    manifest = newer / "manifest.json"
    stated = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**stated, "format_version": 99, "what": "is not known here"}))
    with pytest.raises(NewerFormat, match=r"step-000002.*version 99 is newer"):
        find_checkpoint(checkpoints)
    assert state.read_bytes() == data


def test_what_is_kept_and_where_the_pointer_points(tmp_path: Path) -> None:
    small_trainer(tmp_path, steps=9, validate=False, checkpoint_every=1, keep_checkpoints=2, keep_every=4).run()
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [
        "step-000004",
        "step-000008",
        "step-000009",
    ]
    pointer = json.loads((checkpoints / "last-good.json").read_text())
    assert pointer == {"checkpoint": "step-000009", "step": 9}
    # The pointer decides, for a run may go on from an earlier checkpoint and leave later ones of another course.
    (checkpoints / "last-good.json").write_text('{"checkpoint": "step-000008", "step": 8}')
    chosen = latest_checkpoint(checkpoints)
    assert chosen is not None
    assert chosen.name == "step-000008"
    (checkpoints / "last-good.json").write_text("{")
    chosen = latest_checkpoint(checkpoints)
    assert chosen is not None
    assert chosen.name == "step-000009"


def _save_with_a_failing_rank(directory: str, asynchronous: bool) -> tuple[str | None, str | None, int]:
    engine = seam.start(seam.SeamCase(DeepSpeedEngineConfig(zero_stage=1, data_parallel=2), lora=False))
    chosen = CheckpointSaver(directory, asynchronous)
    whole = chosen.begin(1, engine, {}) or chosen.finish()

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a full disk")

    # The second rank's first write goes wrong; the first rank's disk is well.
    with before_call(Path(directory), 2 if engine.topology.rank == 1 else 0, full):
        cut = chosen.begin(2, engine, {}) or chosen.finish()
    again = chosen.begin(3, engine, {}) or chosen.finish()
    assert whole is not None
    assert cut is not None
    assert again is not None
    assert whole.path is not None
    assert cut.path is None
    newest = find_checkpoint(directory)
    engine.close()
    assert newest is not None
    return str(whole.path), cut.problem, newest.step


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_is_there_for_all_ranks_or_none(pool: WorkerPool, tmp_path: Path, asynchronous: bool) -> None:
    answers = pool.run(_save_with_a_failing_rank, 2, str(tmp_path), asynchronous)
    assert answers[0] == answers[1]
    assert answers[0][1] == "rank 1: a full disk: No space left on device"
    assert answers[0][2] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-good.json", "step-000001", "step-000003"]
    assert len(list((tmp_path / "step-000003").glob("state-*.safetensors"))) == 2
