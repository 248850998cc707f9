"""Ranks, seeds and the environment they come from."""

from __future__ import annotations

import os
import pytest
import torch

from hcx.dist import Topology, derived_generator, derived_seed, process_environment
from hcx.errors import LaunchError


def test_every_rank_has_its_own_place_in_the_grid() -> None:
    places = {(t.tp_rank, t.dp_rank, t.pp_rank) for t in (Topology(rank, 8, tp_size=2, pp_size=2) for rank in range(8))}
    assert len(places) == 8
    assert Topology(1, 8, 2, 2).tp_rank == 1
    assert Topology(7, 8, 2, 2).is_last_stage


def test_processes_that_do_not_fill_the_grid_are_refused() -> None:
    with pytest.raises(LaunchError, match="multiple of 4"):
        Topology(0, 6, tp_size=2, pp_size=2)


def test_seeds_depend_on_every_part_and_its_type() -> None:
    seeds = {
        derived_seed(1, "data", 0),
        derived_seed(1, "data", 1),
        derived_seed(2, "data", 0),
        derived_seed("1", "data", 0),
    }
    assert len(seeds) == 4
    first, second = (torch.rand(3, generator=derived_generator(5, "x")) for _ in range(2))
    assert torch.equal(first, second)


def test_environment_is_read_from_torchrun_or_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE", "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)
    assert process_environment() == (0, 1, 0)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    # The shell of a batch job knows all this too, and is no task: what it starts is one process.
    assert process_environment() == (0, 1, 0)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert process_environment() == (5, 8, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process_environment() == (2, 4, 2)
