"""Illegal layouts are refused with the reason and the nearest legal value."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.engine.legality import nearest_divisor, require_legal, violations
from hcx.errors import ConfigError
from hcx.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=256, hidden_size=48, intermediate_size=96, num_layers=6, num_heads=12, num_kv_heads=4, head_dim=4
)


@pytest.mark.parametrize(("tp", "pp", "world"), [(1, 1, 1), (2, 1, 2), (4, 3, 12), (4, 6, 48), (1, 2, 8)])
def test_layouts_that_divide_everything_are_legal(tp: int, pp: int, world: int) -> None:
    engine = MegatronEngineConfig(tensor_parallel=tp, pipeline_parallel=pp)
    assert violations(engine, MODEL, world) == []


def test_tensor_parallel_that_splits_a_kv_head_names_the_head_count_and_the_nearest_legal_value() -> None:
    engine = MegatronEngineConfig(tensor_parallel=3)
    with pytest.raises(ConfigError) as caught:
        require_legal(engine, MODEL, 3)
    message = str(caught.value)
    assert "engine.tensor_parallel = 3" in message
    assert "model.num_kv_heads = 4" in message
    assert "nearest legal value: 2" in message


def test_pipeline_parallel_that_does_not_divide_the_blocks_names_the_nearest_legal_value() -> None:
    (found,) = violations(MegatronEngineConfig(pipeline_parallel=4), MODEL, 4)
    assert found.key == "engine.pipeline_parallel"
    assert "model.num_layers = 6" in found.reason
    assert found.nearest == 3


def test_more_stages_than_blocks_are_refused() -> None:
    (found,) = violations(MegatronEngineConfig(pipeline_parallel=12), MODEL, 12)
    assert found.nearest == 6


def interleaved(chunks: int, pp: int = 2, **options: int) -> MegatronEngineConfig:
    return MegatronEngineConfig(pipeline_parallel=pp, virtual_pipeline_parallel=chunks, **options)


@pytest.mark.parametrize(("pp", "chunks", "micro_batches"), [(2, 3, 4), (3, 2, 3), (2, 3, None), (1, 1, 3)])
def test_chunks_of_whole_blocks_and_groups_of_micro_batches_are_legal(
    pp: int, chunks: int, micro_batches: int | None
) -> None:
    assert violations(interleaved(chunks, pp), MODEL, pp, micro_batches=micro_batches) == []


@pytest.mark.parametrize(
    ("engine", "reason", "nearest"),
    [
        (interleaved(0), "at least 1", 1),
        (interleaved(3, pp=1), "pipeline_parallel is 1", 1),
        (interleaved(2), "does not divide the 3 of a stage", 1),
        (interleaved(4), "does not divide the 3 of a stage", 3),
    ],
)
def test_an_interleaved_pipeline_that_the_blocks_do_not_allow_is_refused(
    engine: MegatronEngineConfig, reason: str, nearest: int
) -> None:
    (found,) = violations(engine, MODEL, engine.pipeline_parallel)
    assert found.key == "engine.virtual_pipeline_parallel"
    assert reason in found.reason
    assert found.nearest == nearest


def test_an_interleaved_pipeline_needs_whole_groups_of_micro_batches_on_each_replica() -> None:
    engine = interleaved(3, data_parallel=2)
    assert violations(engine, MODEL, 4, micro_batches=8) == []
    (found,) = violations(engine, MODEL, 4, micro_batches=6)
    assert "groups of pipeline_parallel = 2, and a step has 3 on each replica" in found.reason
    with pytest.raises(ConfigError, match=r"on 4 processes: engine\.virtual_pipeline_parallel=1$"):
        require_legal(engine, MODEL, 4, micro_batches=6)


def test_a_number_of_processes_that_the_layout_cannot_use_is_refused() -> None:
    (found,) = violations(MegatronEngineConfig(tensor_parallel=2, pipeline_parallel=2), MODEL, 6)
    assert "start a multiple of 4" in found.reason


@pytest.mark.parametrize("engine", [TorchEngineConfig(data_parallel=3), DeepSpeedEngineConfig(data_parallel=3)])
def test_a_stated_number_of_replicas_must_be_the_number_of_processes(
    engine: TorchEngineConfig | DeepSpeedEngineConfig,
) -> None:
    (found,) = violations(engine, MODEL, 2)
    assert (found.key, found.nearest) == ("engine.data_parallel", 2)


def test_sequence_parallel_needs_tensor_parallel_ranks_and_a_divisible_row() -> None:
    (alone,) = violations(MegatronEngineConfig(sequence_parallel=True), MODEL, 1)
    assert alone.nearest is False
    (odd,) = violations(MegatronEngineConfig(sequence_parallel=True, tensor_parallel=2), MODEL, 2, seq_len=33)
    assert "33 tokens" in odd.reason


@pytest.mark.parametrize("engine", [DeepSpeedEngineConfig(missing_gradients="skip")])
def test_skipping_missing_gradients_is_refused_where_gradients_live_in_flat_buffers(
    engine: DeepSpeedEngineConfig,
) -> None:
    (found,) = violations(engine, MODEL, 1)
    assert found.nearest == "zero"
    assert violations(TorchEngineConfig(missing_gradients="skip"), MODEL, 1) == []


def test_stage_0_has_nothing_to_offload() -> None:
    (found,) = violations(DeepSpeedEngineConfig(zero_stage=0, offload_optimizer="cpu"), MODEL, 2)
    assert (found.key, found.nearest) == ("engine.offload_optimizer", "none")
    assert violations(DeepSpeedEngineConfig(zero_stage=1, offload_optimizer="cpu"), MODEL, 2) == []


def test_every_broken_rule_is_reported_at_once() -> None:
    engine = MegatronEngineConfig(tensor_parallel=5, pipeline_parallel=5, missing_gradients="skip")
    with pytest.raises(ConfigError) as caught:
        require_legal(engine, MODEL, 25)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    assert lines[-1].startswith("nearest legal layout on 25 processes: ")


@pytest.mark.parametrize(("number", "wanted", "nearest"), [(6, 4, 3), (12, 5, 4), (8, 6, 4), (7, 3, 1), (4, 100, 4)])
def test_nearest_divisor(number: int, wanted: int, nearest: int) -> None:
    assert nearest_divisor(number, wanted) == nearest


def test_legality_answers_without_torch() -> None:
    code = "import sys; import hcx.engine.legality; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
