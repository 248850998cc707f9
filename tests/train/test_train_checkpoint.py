"""Checkpoints: complete or absent, resumed exactly, damage named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hcx.engine.config import TorchEngineConfig
from hcx.engine.torch_engine import TorchEngine
from hcx.errors import CheckpointError
from hcx.model.weights import InitWeights
from hcx.optim import OptimConfig
from hcx.testing.runs import small_trainer, weights_of
from hcx.testing.tiny import tiny_config
from hcx.train import CheckpointReader, TrainerConfig, latest_checkpoint


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_a_resumed_run_ends_with_the_same_bits(kind: str, precision: str, tmp_path: Path) -> None:
    straight = small_trainer(tmp_path / "straight", kind, precision=precision)
    assert straight.run().finished
    asked = iter([None, None, None, "a test"])
    first = small_trainer(tmp_path / "broken", kind, stop=lambda: next(asked), precision=precision)
    result = first.run()
    assert not result.finished
    assert result.step == 3
    second = small_trainer(tmp_path / "broken", kind, precision=precision)
    newest = latest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert newest is not None
    second.resume(CheckpointReader(newest))
    ended = second.run()
    assert ended.finished
    assert ended.tokens == straight.tokens
    for name, tensor in weights_of(straight).items():
        assert torch.equal(tensor, weights_of(second)[name]), name


def test_an_unfinished_directory_is_never_chosen_and_never_blocks(tmp_path: Path) -> None:
    small_trainer(tmp_path, "adamw", checkpoint_every=3).run()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "step-000006"
    (newest / "manifest.json").unlink()
    (tmp_path / "checkpoints" / ".step-000009.partial").mkdir()
    older = latest_checkpoint(tmp_path / "checkpoints")
    assert older is not None
    assert older.name == "step-000003"


def test_a_cut_file_is_named_and_the_earlier_checkpoint_is_taken(tmp_path: Path) -> None:
    small_trainer(tmp_path, "adamw", checkpoint_every=3).run()
    file = tmp_path / "checkpoints" / "step-000006" / "state-00000.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state-00000\.safetensors: missing or cut short"):
        CheckpointReader(file.parent)
    older = latest_checkpoint(tmp_path / "checkpoints")
    assert older is not None
    assert older.name == "step-000003"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    small_trainer(tmp_path, "sgd", checkpoint_every=1, keep_checkpoints=2).run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last-good.json", "step-000005", "step-000006"]


def test_another_global_batch_is_refused_on_resume(tmp_path: Path) -> None:
    small_trainer(tmp_path, "sgd").run()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    other = small_trainer(tmp_path, "sgd")
    other.config = TrainerConfig(steps=6, global_batch=8, micro_batch=2)
    with pytest.raises(CheckpointError, match="global_batch = 4, now 8"):
        other.resume(CheckpointReader(newest))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    small_trainer(tmp_path, "sgd").run()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    config = tiny_config(num_layers=3)
    engine = TorchEngine(
        engine_config=TorchEngineConfig(),
        model_config=config,
        optim_config=OptimConfig(kind="sgd"),
        weights=InitWeights(config, 1),
    )
    with pytest.raises(CheckpointError, match="does not hold this model"):
        engine.load_slices(CheckpointReader(newest))
