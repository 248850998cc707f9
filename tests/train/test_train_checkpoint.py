"""Checkpoints: complete or absent, resumed exactly, damage named."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path

import pytest
import torch

from hcx.data.batch import MicroBatch
from hcx.engine.config import TorchEngineConfig
from hcx.engine.torch_engine import TorchEngine
from hcx.errors import CheckpointError
from hcx.model.weights import InitWeights
from hcx.optim import OptimConfig, Schedule
from hcx.testing.batches import packed_rows, take_rows
from hcx.testing.tiny import tiny_config
from hcx.train import CheckpointReader, NextToken, Trainer, TrainerConfig, latest_checkpoint
from hcx.train.validation import ValidationSet


class Rows:
    """A loader of random rows, a function of the step."""

    def batches(
        self,
        start_step: int,
        stop_step: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        threads: int,
    ) -> Generator[list[MicroBatch]]:
        share = global_batch // dp_size
        for step in range(start_step, stop_step):
            rows = packed_rows(global_batch, 16, 384, seed=step)
            starts = range(dp_rank * share, (dp_rank + 1) * share, micro_batch)
            yield [take_rows(rows, start, start + micro_batch) for start in starts]

    def state_dict(self) -> dict[str, int]:
        return {"sequence": 16}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        assert state == self.state_dict()


def _trainer(directory: Path, kind: str, steps: int = 6, stop=None, precision: str = "fp32", **options) -> Trainer:
    config = tiny_config()
    optim = OptimConfig(kind=kind, lr=1e-2, momentum=0.9, schedule=Schedule(warmup_steps=2))
    engine = TorchEngine(
        engine_config=TorchEngineConfig(precision=precision),
        model_config=config,
        optim_config=optim,
        weights=InitWeights(config, 1),
    )
    return Trainer(
        TrainerConfig(steps=steps, global_batch=4, micro_batch=2, **options),
        engine,
        Rows(),
        NextToken(),
        optim.schedule,
        directory,
        validation=[ValidationSet("ko", [packed_rows(2, 16, 384, seed=100)], 50)],
        stop=stop,
    )


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.engine.export_state())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_a_resumed_run_ends_with_the_same_bits(kind: str, precision: str, tmp_path: Path) -> None:
    straight = _trainer(tmp_path / "straight", kind, precision=precision)
    assert straight.run().finished
    asked = iter([None, None, None, "a test"])
    first = _trainer(tmp_path / "broken", kind, stop=lambda: next(asked), precision=precision)
    result = first.run()
    assert not result.finished
    assert result.step == 3
    second = _trainer(tmp_path / "broken", kind, precision=precision)
    newest = latest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert newest is not None
    second.resume(CheckpointReader(newest))
    ended = second.run()
    assert ended.finished
    assert ended.tokens == straight.tokens
    for name, tensor in _weights(straight).items():
        assert torch.equal(tensor, _weights(second)[name]), name


def test_an_unfinished_directory_is_never_chosen_and_never_blocks(tmp_path: Path) -> None:
    _trainer(tmp_path, "adamw", checkpoint_every=3).run()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "step-000006"
    (newest / "manifest.json").unlink()
    (tmp_path / "checkpoints" / ".step-000009.partial").mkdir()
    older = latest_checkpoint(tmp_path / "checkpoints")
    assert older is not None
    assert older.name == "step-000003"


def test_a_cut_file_is_named_and_the_earlier_checkpoint_is_taken(tmp_path: Path) -> None:
    _trainer(tmp_path, "adamw", checkpoint_every=3).run()
    file = tmp_path / "checkpoints" / "step-000006" / "state-00000.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state-00000\.safetensors: missing or cut short"):
        CheckpointReader(file.parent)
    older = latest_checkpoint(tmp_path / "checkpoints")
    assert older is not None
    assert older.name == "step-000003"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    _trainer(tmp_path, "sgd", checkpoint_every=1, keep_checkpoints=2).run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last-good.json", "step-000005", "step-000006"]


def test_another_global_batch_is_refused_on_resume(tmp_path: Path) -> None:
    _trainer(tmp_path, "sgd").run()
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    other = _trainer(tmp_path, "sgd")
    other.config = TrainerConfig(steps=6, global_batch=8, micro_batch=2)
    with pytest.raises(CheckpointError, match="global_batch = 4, now 8"):
        other.resume(CheckpointReader(newest))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _trainer(tmp_path, "sgd").run()
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
