"""From a checkpoint to the loss and the samples of every step that led to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hcx.artifacts import read_manifest
from hcx.errors import CheckpointError
from hcx.obs import read_jsonl
from hcx.testing.runs import small_trainer
from hcx.train import CheckpointReader, latest_checkpoint, read_ledger
from hcx.train.ledger import Ledger, as_ranges


def newest(run: Path) -> Path:
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None
    return found


def test_the_ledger_of_a_checkpoint_has_every_step_with_its_loss_and_samples(tmp_path: Path) -> None:
    small_trainer(tmp_path, steps=7, checkpoint_every=3, keep_checkpoints=1).run()
    rows = read_ledger(newest(tmp_path))
    trained = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["train/loss"]) for row in trained]
    assert [row["samples"] for row in rows] == [[[4 * step, 4 * step + 4]] for step in range(7)]
    # Older checkpoints are gone, their pieces of the ledger are not.
    assert len(list((tmp_path / "ledger").iterdir())) == 3
    named = [item for item in read_manifest(newest(tmp_path)).inputs if item.role == "ledger"]
    assert len(named) == 1


def test_the_ledger_moves_with_the_run_and_is_checked(tmp_path: Path) -> None:
    small_trainer(tmp_path / "run", steps=4, checkpoint_every=2).run()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert len(read_ledger(newest(moved))) == 4
    first = min((moved / "ledger").iterdir())
    data = first.read_text()
    first.write_text(data.replace('"step": 1', '"step": 9'))
    with pytest.raises(CheckpointError, match=rf"{first.name}: does not match its digest"):
        read_ledger(newest(moved))
    first.unlink()
    with pytest.raises(CheckpointError, match=rf"{first.name}: a piece of the ledger cannot be read"):
        read_ledger(newest(moved))


def test_a_run_that_goes_on_elsewhere_takes_the_ledger_along(tmp_path: Path) -> None:
    small_trainer(tmp_path / "one", steps=4, checkpoint_every=2, keep_checkpoints=0).run()
    other = small_trainer(tmp_path / "two", steps=6)
    other.resume(CheckpointReader(tmp_path / "one" / "checkpoints" / "step-000002"))
    other.run()
    assert [row["step"] for row in read_ledger(newest(tmp_path / "two"))] == list(range(1, 7))


def test_rows_of_a_save_that_failed_go_into_the_next_piece(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(1, {"loss": 2.0})
    lost = ledger.seal()
    ledger.add(2, {"loss": float("nan")})
    kept = ledger.seal()
    assert lost is not None
    assert kept is not None
    lines: list[dict[str, Any]] = [json.loads(line) for line in kept.data.decode().splitlines()]
    assert lines == [{"previous": None}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}]
    ledger.confirm(kept)
    assert ledger.seal() is None


def test_samples_are_written_as_ranges() -> None:
    assert as_ranges(()) == []
    assert as_ranges((0, 1, 2, 7, 9, 10)) == [[0, 3], [7, 8], [9, 11]]
