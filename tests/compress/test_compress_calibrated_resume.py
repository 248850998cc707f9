"""Compressions that read calibration text: interrupted ones end with the same bytes, pruned ones read it too."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from hcx.compress import CompressPlan, ModulePlan, compress_model
from hcx.data.batch import MicroBatch
from hcx.errors import CheckpointError, ConfigError
from hcx.model.load import ModelFiles
from hcx.testing.tiny import tiny_model_directory

PLAN = CompressPlan(default=ModulePlan(bits=2, group_size=32, rounds=3, feedback=True, descent=1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("models") / "full", with_tokenizer=False, num_layers=3)


def _text(seed: int) -> list[MicroBatch]:
    tokens = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(seed))
    return [MicroBatch(tokens=tokens, labels=tokens, weights=torch.ones(4, 48), positions=None, document_ids=None)]


def _weights(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("bcq*.safetensors")}


class _Stopped(Exception):
    pass


def _stop_after(count: int) -> object:
    seen = []

    def progress(name: str) -> None:
        seen.append(name)
        if len(seen) == count:
            raise _Stopped

    return progress


def test_an_interrupted_calibrated_compression_ends_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """Blocks that were finished are passed over with what was stored of them: later ones read what went through."""
    compress_model(model, tmp_path / "whole", PLAN, calibration=_text(1))
    with pytest.raises(_Stopped):
        compress_model(model, tmp_path / "out", PLAN, _stop_after(1 + 9 + 9 + 3), _text(1))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    compress_model(model, tmp_path / "out", PLAN, calibration=_text(1))
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")


def test_work_does_not_go_on_with_other_calibration_text(model: Path, tmp_path: Path) -> None:
    with pytest.raises(_Stopped):
        compress_model(model, tmp_path / "out", PLAN, _stop_after(12), _text(1))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="unfinished work of another plan"):
        compress_model(model, tmp_path / "out", PLAN, calibration=_text(2))


def test_pruning_by_what_layers_read_goes_through_a_plan(model: Path, tmp_path: Path) -> None:
    lost = {}
    for criterion in ("activation", "obs"):
        plan = CompressPlan.model_validate(
            {"default": {"bits": 3, "group_size": 32, "prune": {"sparsity": 0.6, "criterion": criterion}}}
        )
        with pytest.raises(ConfigError, match="calibration text"):
            compress_model(model, tmp_path / "without", plan)
        summary = compress_model(model, tmp_path / criterion, plan, calibration=_text(1))
        errors = [module.output_error for module in summary.modules]
        assert all(error is not None and 0 < error < 1 for error in errors)
        lost[criterion] = sum(error for error in errors if error is not None)
        with ModelFiles(tmp_path / criterion) as files:
            weight = files.packed("model.layers.1.mlp.up_proj").dequantize()
        assert float((weight == 0).float().mean()) == pytest.approx(0.6, abs=0.01)
    # What stays makes up for what went (Frantar and Alistarh 2023): the outputs keep more.
    assert lost["obs"] < 0.9 * lost["activation"]
