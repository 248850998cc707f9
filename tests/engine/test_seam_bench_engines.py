"""The engines and their libraries' own loops take turns, and both learn."""

from __future__ import annotations

import pytest
import torch

from hcx.data.batch import MicroBatch
from hcx.errors import ConfigError
from hcx.recipe.bench_engines import EngineRow, Library, engine_cases, measure_engines
from hcx.testing.tiny import tiny_config
from hcx.testing.workers import WorkerPool


def _measured(library: Library) -> list[EngineRow]:
    return list(measure_engines(library, pairs=2, quick=True, warmup=1))


@pytest.mark.parametrize("library", ["deepspeed", "megatron"])
def test_both_take_turns_on_two_processes(pool: WorkerPool, library: Library) -> None:
    pytest.importorskip("deepspeed" if library == "deepspeed" else "megatron.core")
    first, second = pool.run(_measured, 2, library)
    assert [(row.layout, row.loop) for row in first] == [(case.name, case.loop) for case in engine_cases(library, True)]
    for row in first:
        assert row.pairs == 2
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.hcx_ms > 0
        assert row.loop_ms > 0
    # The slower rank's time counts, on both.
    assert [(row.hcx_ms, row.loop_ms) for row in first] == [(row.hcx_ms, row.loop_ms) for row in second]


def _losses(library: str, sequence_parallel: bool = False) -> list[float]:
    from hcx.dist import Topology, rehearsal
    from hcx.engine.config import MegatronEngineConfig
    from hcx.recipe.engine_peers import deepspeed_loop, megatron_loop

    rehearsal.enable()
    torch.manual_seed(0)
    model = tiny_config(tie_embeddings=True)
    tokens = torch.randint(model.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 16), torch.arange(16).expand(2, -1))
    if library == "deepspeed":
        loop, _ = deepspeed_loop(model, 1, 2, own_decoder=True)
    else:
        from hcx.engine.megatron_stage import acquire_groups

        with rehearsal.redirected():
            acquire_groups(Topology(torch.distributed.get_rank(), 2, tp_size=2))
        layout = MegatronEngineConfig(tensor_parallel=2, sequence_parallel=sequence_parallel)
        loop = megatron_loop(model, layout, 2, 16)
    losses = [loop([batch, batch]) for _ in range(30)]
    return [float(loss) for loss in losses if loss is not None]


@pytest.mark.parametrize("library", ["deepspeed", "megatron"])
def test_the_librarys_own_loop_learns_its_batch(pool: WorkerPool, library: str) -> None:
    """Or a step would be compared with one that does less."""
    pytest.importorskip("deepspeed" if library == "deepspeed" else "megatron.core")
    losses = pool.run(_losses, 2, library)[0]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.05


def test_the_loops_sequence_parallel_norm_gets_whole_gradients(pool: WorkerPool) -> None:
    pytest.importorskip("megatron.core")
    whole, parts = (pool.run(_losses, 2, "megatron", split)[0] for split in (False, True))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_other_engines_are_refused() -> None:
    from hcx.cli.bench_engines import bench_engines

    with pytest.raises(ConfigError, match="valid: deepspeed, megatron"):
        bench_engines("torch", True, 5, None, False)
