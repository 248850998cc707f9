"""Rehearsals: every shipped size runs its kinds of parallelism here, and what is wrong is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from hcx.artifacts import find_resource
from hcx.dist import rehearsal
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig
from hcx.errors import LaunchError
from hcx.launch import rehearsal_case, rehearse, roles
from hcx.launch.rehearsal_case import RankReport, RehearsalCase, run_cases
from hcx.model.shapes import stage_parameters
from hcx.recipe import load_train_recipe
from hcx.testing.workers import WorkerPool


def shipped(name: str, *overrides: str) -> Any:
    return load_train_recipe(find_resource(f"launch/train/{name}.yaml"), overrides)


def on_pool(pool: WorkerPool) -> rehearse.Runner:
    """Ranks are the session's workers, which have imported already."""
    return lambda cases, world_size: pool.run(run_cases, world_size, list(cases))


@pytest.mark.parametrize(
    ("name", "overrides", "processes"),
    [
        ("125m", [], 1),
        ("1.3b", ["engine.offload_optimizer=cpu"], 2),
        ("7b", [], 4),
        # All three axes make eight processes, which the long test runs.
        ("70b", ["engine.data_parallel=1", "engine.distributed_optimizer=false"], 4),
        (
            "70b",
            [
                "engine.tensor_parallel=1",
                "engine.sequence_parallel=false",
                "engine.data_parallel=2",
                "engine.virtual_pipeline_parallel=5",
            ],
            4,
        ),
    ],
)
def test_shipped_sizes_rehearse(pool: WorkerPool, name: str, overrides: list[str], processes: int) -> None:
    recipe = shipped(name, *overrides)
    outcome = rehearse.rehearse(recipe, None if processes == 1 else on_pool(pool))
    assert outcome.rehearsal.world_size == processes == len(outcome.held)
    assert set(outcome.difference) == {"fp32", "bf16"}
    assert outcome.difference["fp32"] < 1e-5
    assert outcome.resumed < 1e-5
    assert sum(len(role.pp_ranks) * role.blocks for role in outcome.roles) == recipe.model.num_layers


@pytest.mark.slow
def test_the_70b_rehearses_all_three_axes_on_eight_processes(pool: WorkerPool) -> None:
    outcome = rehearse.rehearse(shipped("70b"), on_pool(pool))
    assert len(outcome.held) == 8
    assert outcome.difference["fp32"] < 1e-5


def test_the_command_starts_the_ranks_and_prints_json() -> None:
    command = [sys.executable, "-m", "hcx.cli.main", "train", "launch/train/1.3b.yaml", "--rehearse", "--json"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["processes"] == 2
    assert outcome["engine"]["zero_stage"] == 2
    assert "engine.data_parallel 8 -> 2" in outcome["reduced"]
    assert outcome["loss_difference"]["fp32"] < 1e-5
    assert len(outcome["bytes_by_rank"]) == 2


@pytest.mark.parametrize("name", ["125m", "1.3b", "7b", "70b"])
def test_a_rehearsal_keeps_every_kind_of_parallelism_and_at_most_eight_processes(name: str) -> None:
    recipe = shipped(name)
    small = rehearse.reduce_recipe(recipe)
    assert small.world_size <= 8
    for axis in ("tensor_parallel", "pipeline_parallel", "data_parallel"):
        asked = getattr(recipe.engine, axis, 1) or 1
        assert (getattr(small.engine, axis, 1) or 1) == min(2, asked)
        assert any(axis in line for line in small.reduced) == (asked > 2)
    kept = ("tie_embeddings", "architecture", "use_post_norm", "rope_theta")
    assert all(getattr(small.cases[-1].model, key) == getattr(recipe.model, key) for key in kept)
    assert (small.cases[0].engine.precision, small.cases[-1].engine.precision) == ("fp32", "bf16")


Change = Any


def altered(change: Change) -> rehearse.Runner:
    """One rank, whose reports are changed."""
    return lambda cases, world_size: [[change(report) for report in honest_reports()]]


@cache
def honest_reports() -> list[RankReport]:
    """Of one rank of the smallest size."""
    return run_cases(list(rehearse.reduce_recipe(shipped("125m")).cases))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, losses=[*r.losses[:-1], r.losses[-1] + 1e-1]), "computes something else"),
        (lambda r: replace(r, losses=[math.nan, *r.losses[1:]]), "step 0: the loss in fp32 is nan"),
        (lambda r: replace(r, grad_norms=[r.grad_norms[0] * 1.01, *r.grad_norms[1:]]), "gradient norm"),
        (lambda r: replace(r, held={**r.held, "optimizer": r.held["optimizer"] + 4}), "the plan counts"),
        (lambda r: replace(r, held={**r.held, "weights": r.held["weights"] - 2}), "the plan counts"),
    ],
)
def test_what_differs_from_one_process_or_from_the_plan_is_refused(change: Change, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        rehearse.rehearse(shipped("125m"), altered(change))


def test_a_checkpoint_that_does_not_go_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The process that goes on reads another run's checkpoint.
    honest = rehearse.run_case

    def other(case: RehearsalCase) -> RankReport:
        return honest(case.model_copy(update={"seed": case.seed + 1}) if case.resume_from else case)

    monkeypatch.setattr(rehearse, "run_case", other)
    with pytest.raises(LaunchError, match="after the ranks' checkpoint"):
        rehearse.rehearse(shipped("125m"))


def test_a_plan_that_forgets_a_parameter_is_found_by_the_real_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = shipped("70b")
    args = (recipe.engine, recipe.model, recipe.optim, recipe.world_size)
    assert [role.pp_ranks for role in roles.check_roles(*args)] == [(0,), (1, 2), (3,)]
    monkeypatch.setattr(roles, "stage_parameters", lambda *a: stage_parameters(*a)[1:])
    with pytest.raises(LaunchError, match="where the plan counts"):
        roles.check_roles(*args)


def test_ranks_that_hold_a_row_twice_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = shipped("7b")
    honest = roles.build_stage
    monkeypatch.setattr(roles, "build_stage", lambda model, stage, tp, rank, dtype: honest(model, stage, tp, 0, dtype))
    with pytest.raises(LaunchError, match="elements"):
        roles.check_roles(recipe.engine, recipe.model, recipe.optim, recipe.world_size)


def test_an_adapters_recipe_rehearses_its_frozen_base() -> None:
    case = rehearse.reduce_recipe(shipped("125m")).cases[0]
    frozen = case.model_copy(update={"adapter": rehearse.LoRAConfig(rank=2)})
    (whole,), (part,) = run_cases([case]), run_cases([frozen])
    assert part.held["optimizer"] < whole.held["optimizer"] / 4
    assert part.losses[0] == pytest.approx(whole.losses[0], rel=1e-5)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one GPU, as far as anyone asks."""
    monkeypatch.setattr(rehearsal, "_enabled", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_where_there_is_cuda_a_rehearsal_on_too_few_gpus_is_refused_and_redirects_nothing(cuda: None) -> None:
    started: list[int] = []
    with pytest.raises(LaunchError, match="needs 4 GPUs, and this machine has 1"):
        rehearse.rehearse(shipped("7b"), lambda cases, world_size: started.append(world_size) or [])
    assert started == []
    assert not rehearsal.is_enabled()
    assert torch.cuda.current_device.__module__ == "torch.cuda"


def test_where_there_is_cuda_a_rank_never_enables_the_redirection(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Built(Exception):
        pass

    def build(*arguments: Any) -> None:
        with rehearsal.redirected():
            assert torch.cuda.current_device.__module__ == "torch.cuda"
            assert torch.zeros(1).type() == "torch.FloatTensor"
        raise Built

    monkeypatch.setattr(rehearsal_case, "build_engine", build)
    case = rehearse.reduce_recipe(shipped("70b")).cases[0]
    assert isinstance(case.engine, MegatronEngineConfig)
    with pytest.raises(Built):
        rehearsal_case.run_case(case)
    assert not rehearsal.is_enabled()


def test_a_rehearsal_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="without torchrun or srun"):
        rehearse.rehearse(shipped("125m"))


def test_cases_survive_the_way_to_the_ranks(tmp_path: Any) -> None:
    case = rehearse.reduce_recipe(shipped("1.3b")).cases[-1]
    rehearsal_case.write_cases(tmp_path, [case])
    (text,) = json.loads((tmp_path / "cases.json").read_text(encoding="utf-8"))
    again = RehearsalCase.model_validate_json(json.dumps(text))
    assert again == case
    assert isinstance(again.engine, DeepSpeedEngineConfig)
