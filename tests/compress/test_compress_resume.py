"""Compressions that are killed, run out of disk or are begun twice: what is finished stays, and the end is the same."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hcx.artifacts import durable, is_complete, verify
from hcx.artifacts.tensors import join_safetensors, write_safetensors
from hcx.cli.main import main
from hcx.compress import CompressPlan, ModulePlan, compress_model
from hcx.compress.work import WorkDirectory
from hcx.errors import CheckpointError
from hcx.testing.tiny import tiny_model_directory

PLAN = CompressPlan(default=ModulePlan(bits=2, group_size=24, rounds=3, offset=True))
TENSORS_PER_BLOCK = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("models") / "full", num_layers=4, tie_embeddings=False)


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    out = model.parent / "uninterrupted"
    compress_model(model, out, PLAN)
    return out


def _contents(directory: Path) -> dict[str, str]:
    """Digest of every file; the manifest states its time and the path of its input, and is compared by its own list."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name not in ("manifest.json", "compression.json")
    }


def _check_same(found: Path, expected: Path) -> None:
    assert verify(found).counts == verify(expected).counts
    assert _contents(found) == _contents(expected)
    assert [path.name for path in found.parent.iterdir() if path.name.startswith(f".{found.name}")] == []


KILLED = """
    import os, signal, sys
    from hcx.compress import CompressPlan, compress_model
    left = int(sys.argv[4])
    def progress(name):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    compress_model(sys.argv[1], sys.argv[2], CompressPlan.model_validate_json(sys.argv[3]), progress)
"""


def _command(model: Path, out: Path, tensors: int) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(KILLED), str(model), str(out), PLAN.model_dump_json(), str(tensors)]


def test_a_killed_command_goes_on_where_it_was_and_ends_with_the_same_bytes(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bcq"
    # Killed inside the third block: the embedding and two blocks are finished.
    answer = subprocess.run(_command(model, out, 1 + 2 * TENSORS_PER_BLOCK + 4), check=False, timeout=300)
    assert answer.returncode == -signal.SIGKILL
    assert not out.exists()
    assert sorted(path.name for path in (tmp_path / ".bcq.work").glob("layer-*.json")) == [
        f"layer-{number:05d}.json" for number in range(3)
    ]
    quantized = []
    quantize = ModulePlan.quantize
    monkeypatch.setattr(ModulePlan, "quantize", lambda *given: quantized.append(1) or quantize(*given))
    compress_model(model, out, PLAN)
    assert len(quantized) == 2 * 7  # the matrices of the two blocks that were not finished
    _check_same(out, whole)


@pytest.mark.slow
def test_ten_kills_at_random_times_change_no_byte(tmp_path: Path) -> None:
    model = tiny_model_directory(
        tmp_path / "full",
        with_tokenizer=False,
        num_layers=4,
        hidden_size=512,
        intermediate_size=1408,
        num_heads=8,
        vocab_size=4096,
    )
    begun = time.monotonic()
    subprocess.run(_command(model, tmp_path / "expected", 0), check=True, timeout=600)
    duration = time.monotonic() - begun
    out, generator, kills = tmp_path / "bcq", random.Random(0), 0
    while kills < 10:
        process = subprocess.Popen(_command(model, out, 0))
        try:
            process.wait(duration * generator.uniform(0.3, 0.9))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.wait()
        # Present means whole, at every moment.
        assert out.exists() == is_complete(out)
        if out.exists():
            _check_same(out, tmp_path / "expected")
            for path in sorted(out.iterdir()):
                path.unlink()
            out.rmdir()
    subprocess.run(_command(model, out, 0), check=True, timeout=600)
    _check_same(out, tmp_path / "expected")


def test_a_layer_that_was_damaged_meanwhile_is_made_again(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "bcq"
    _interrupt(model, out, 1 + TENSORS_PER_BLOCK + 3)
    finished = tmp_path / ".bcq.work" / "layer-00001.safetensors"
    damaged = bytearray(finished.read_bytes())
    damaged[-3] ^= 1
    finished.write_bytes(damaged)
    (tmp_path / ".bcq.work" / "layer-00000.json").write_text("{")
    compress_model(model, out, PLAN)
    _check_same(out, whole)


def _interrupt(model: Path, out: Path, tensors: int) -> None:
    left = [tensors]

    def progress(name: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(model, out, PLAN, progress)
    assert not out.exists()


def test_unfinished_work_of_another_plan_is_not_mixed_in(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bcq"
    _interrupt(model, out, 12)
    other = CompressPlan(default=ModulePlan(bits=3, group_size=24))
    with pytest.raises(CheckpointError, match=r"\.bcq\.work: unfinished work of another plan or model"):
        compress_model(model, out, other)
    another = tiny_model_directory(tmp_path / "other", num_layers=4, tie_embeddings=False, seed=1)
    with pytest.raises(CheckpointError, match="another plan or model"):
        compress_model(another, out, PLAN)
    assert len(list((tmp_path / ".bcq.work").glob("layer-*.json"))) == 2


def test_two_commands_at_once_do_not_write_into_one_another(model: Path, tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / ".bcq.work", {})
    with pytest.raises(CheckpointError, match="another hcx compress is writing there"):
        compress_model(model, tmp_path / "bcq", PLAN)
    work.remove()
    compress_model(model, tmp_path / "bcq", PLAN)


@pytest.mark.parametrize("part", [0.0, 0.4, 0.99])
def test_a_full_disk_is_told_and_what_was_finished_stays(
    part: float,
    model: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, write = tmp_path / "bcq", os.write
    count = [0]
    with monkeypatch.context() as patched:
        patched.setattr(durable.os, "write", lambda *given: [write(*given), count.append(1)][0])
        compress_model(model, tmp_path / "counted", PLAN)
    left = [int(part * len(count))]

    def full(descriptor: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    plan = tmp_path / "plan.yaml"
    plan.write_text("default: {bits: 2, group_size: 24, rounds: 3, offset: true}\n")
    with monkeypatch.context() as patched:
        patched.setattr(durable.os, "write", full)
        with pytest.raises(SystemExit) as ended:
            main(["compress", str(model), "--plan", str(plan), "--out", str(out)])
    assert ended.value.code == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(model), "--plan", str(plan), "--out", str(out)])
    assert ended.value.code == 0
    _check_same(out, whole)


def test_files_are_joined_without_losing_alignment_or_order(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts, expected = [], {}
    for number in range(3):
        tensors = {
            f"{number}.planes": torch.randint(0, 256, (1, 3, 1 + 2 * number), dtype=torch.uint8, generator=generator),
            f"{number}.scales": torch.randn(1, 3, 1, generator=generator).half(),
            f"{number}.offset": torch.randn(3, 1, generator=generator),
        }
        parts.append(tmp_path / f"part{number}.safetensors")
        write_safetensors(parts[-1], tensors)
        expected |= tensors
    join_safetensors(tmp_path, parts, "one", 1 << 30)
    assert not (tmp_path / "one.safetensors.index.json").exists()
    size = join_safetensors(tmp_path, parts, "several", 40)
    names = ["several-00001-of-00003.safetensors", "several-00002-of-00003.safetensors"]
    found = {**load_file(tmp_path / names[0]), **load_file(tmp_path / names[1])}
    assert "2.planes" not in found
    found |= load_file(tmp_path / "several-00003-of-00003.safetensors")
    assert size == sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    for files in (found, load_file(tmp_path / "one.safetensors")):
        assert set(files) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(files[name], tensor), name
