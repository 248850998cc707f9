"""`hcx train RECIPE --rehearse`: what a cluster would run, small enough for this machine.

Each kind of parallelism of the recipe is kept and reduced to at most 2, so that at most 8 processes run. They train a
tiny model with the recipe's options for a few steps: losses and gradient norms must be those of one process, what each
rank allocates must be what the plan counts for that layout, and a checkpoint of theirs must go on in one process. And
every rank role of the recipe's real shape is built on the meta device and held against the plan.

On a machine with CUDA nothing is redirected: the reduced layout runs on its GPUs, or is refused if they are too few.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hcx.dist.spawn import run_local_ranks
from hcx.dist.topology import process_environment
from hcx.engine.config import MegatronEngineConfig, TorchEngineConfig
from hcx.engine.footprint import AnyEngineConfig, held_bytes
from hcx.engine.legality import require_legal
from hcx.errors import LaunchError
from hcx.launch.rehearsal_case import RankReport, RehearsalCase, read_reports, run_case, run_cases, write_cases
from hcx.launch.roles import Role, check_roles
from hcx.model.adapters import LoRAConfig
from hcx.model.config import ModelConfig
from hcx.recipe.checks import check_recipe
from hcx.recipe.train import TrainRecipe

MOST = 2
"""To what each kind of parallelism is reduced."""
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}
"""Of losses against one process: rounding of sums in another order; bf16 keeps 8 bits of each activation."""


@dataclass(frozen=True)
class Rehearsal:
    """What is going to be rehearsed.

    Attributes:
        engine: the reduced layout.
        world_size: its processes.
        reduced: what was reduced, in words.
        cases: the recipe's precision; before it fp32, where engines can be compared closely.
    """

    engine: AnyEngineConfig
    world_size: int
    reduced: tuple[str, ...]
    cases: tuple[RehearsalCase, ...]


@dataclass(frozen=True)
class Outcome:
    """What a rehearsal showed.

    Attributes:
        rehearsal: what was run.
        roles: of the real shape.
        difference: largest difference of a loss from one process, by precision.
        held: bytes of (weights, optimizer) by rank in the recipe's precision, equal to the plan's; empty: not counted.
        resumed: largest difference of a loss after the checkpoint went on in one process.
        device: what it ran on.
    """

    rehearsal: Rehearsal
    roles: tuple[Role, ...]
    difference: dict[str, float]
    held: tuple[tuple[int, int], ...]
    resumed: float
    device: str


Runner = Callable[[Sequence[RehearsalCase], int], list[list[RankReport]]]
"""Runs cases on so many ranks: of each rank, a report of every case."""


def reduce_recipe(recipe: TrainRecipe) -> Rehearsal:
    """The recipe with each kind of parallelism reduced to at most 2, and a tiny model with its options."""
    engine, reduced = recipe.engine, []
    sizes = {"data_parallel": recipe.data_parallel}
    if isinstance(engine, MegatronEngineConfig):
        sizes |= {"tensor_parallel": engine.tensor_parallel, "pipeline_parallel": engine.pipeline_parallel}
    world = math.prod(min(size, MOST) for size in sizes.values())
    if isinstance(engine, MegatronEngineConfig):
        sizes["virtual_pipeline_parallel"] = engine.virtual_pipeline_parallel
    for name, size in sizes.items():
        if size > MOST:
            reduced.append(f"engine.{name} {size} -> {MOST}")
    small: AnyEngineConfig = engine.model_copy(
        update={**{name: min(size, MOST) for name, size in sizes.items()}, "compile": False}
    )
    if engine.compile:
        reduced.append("engine.compile true -> false")
    depth = ("pipeline_parallel", "virtual_pipeline_parallel")
    model, notes = _tiny(recipe.model, math.prod(min(sizes.get(name, 1), MOST) for name in depth))
    reduced += notes
    optim = recipe.optim.model_copy(update={"eps": max(recipe.optim.eps, 1e-3), "lr": 1e-2})
    if optim.eps != recipe.optim.eps:
        # With a small one, gradients at rounding level become updates of full size, of either sign.
        reduced.append(f"optim.eps {recipe.optim.eps:g} -> {optim.eps:g}, optim.lr {recipe.optim.lr:g} -> 0.01")
    case = RehearsalCase(
        engine=small,
        model=model,
        optim=optim,
        objective=recipe.loss,
        # Scales over frozen codes need a coded base; the layout is rehearsed with all weights trained.
        adapter=LoRAConfig(rank=min(recipe.adapter.rank, 4)) if isinstance(recipe.adapter, LoRAConfig) else None,
        seed=recipe.seed,
    )
    cases = [case.model_copy(update={"engine": small.model_copy(update={"precision": "fp32"})})]
    if engine.precision != "fp32":
        cases.append(case)
    return Rehearsal(small, world, tuple(reduced), tuple(cases))


def _tiny(model: ModelConfig, stages: int) -> tuple[ModelConfig, list[str]]:
    """The same options at a width that takes no time."""
    grouped = model.kv_heads < model.num_heads
    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2 * stages,
        "num_heads": 4,
        "num_kv_heads": 2 if grouped else 4,
        "head_dim": None,
        "max_seq_len": 64,
        # Larger than usual, so that a wrong gradient shows within a few steps.
        "initializer_range": 0.1,
    }
    shown = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
    notes = [f"model.{name} {getattr(model, name)} -> {sizes[name]}" for name in shown]
    return model.model_copy(update=sizes), notes


def rehearse(recipe: TrainRecipe, run: Runner | None = None, say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Rehearses a recipe.

    Args:
        recipe: legal at its real shape.
        run: starts the ranks; processes on this machine if not given.
        say: takes a line about what happens.

    Raises:
        LaunchError: something differs, the ranks failed, or this machine's GPUs are too few.
        ConfigError: the recipe is not legal.
    """
    check_recipe(recipe)
    roles = check_roles(recipe.engine, recipe.model, recipe.optim, recipe.world_size)
    for role in roles:
        say(
            f"stages {', '.join(map(str, role.pp_ranks))}: {role.blocks} blocks, {role.parameters:,} parameters, "
            f"{role.weights:,} bytes of weights, {role.optimizer:,} of optimizer: as planned"
        )
    small = reduce_recipe(recipe)
    require_legal(small.engine, small.cases[-1].model, small.world_size, optimizer=recipe.optim.kind)
    device = _device(small)
    say(f"rehearsing {small.engine.kind} on {small.world_size} processes ({device})")
    say(f"reduced: {'; '.join(small.reduced)}")
    with tempfile.TemporaryDirectory(prefix="hcx-rehearsal-") as directory:
        saving = small.cases[0].model_copy(update={"save_to": directory})
        cases = [saving, *small.cases[1:]]
        ranks = (run or _spawn)(cases, small.world_size)
        difference: dict[str, float] = {
            case.engine.precision: _compare(case, [reports[number] for reports in ranks])
            for number, case in enumerate(cases)
        }
        held = _check_bytes(cases[-1], [reports[-1] for reports in ranks], small.world_size)
        resumed = _resume(saving, ranks[0][0], Path(directory))
    return Outcome(small, tuple(roles), difference, tuple(held), resumed, device)


def _device(small: Rehearsal) -> str:
    rank, world_size, _ = process_environment()
    if world_size > 1:
        raise LaunchError(
            f"--rehearse starts its own processes, but this is rank {rank} of {world_size}; run it once, without "
            "torchrun or srun"
        )
    if not torch.cuda.is_available():
        return "CPU, gloo"
    count = torch.cuda.device_count()
    if count < small.world_size:
        raise LaunchError(
            f"the rehearsal needs {small.world_size} GPUs, and this machine has {count}: where there is CUDA nothing "
            "is redirected to the CPU; rehearse where no GPU is visible (a login node, or CUDA_VISIBLE_DEVICES='')"
        )
    return f"{small.world_size} x {torch.cuda.get_device_name(0)}"


def _one_process(case: RehearsalCase, **changes: object) -> RankReport:
    plain = TorchEngineConfig(precision=case.engine.precision, clip_grad_norm=case.engine.clip_grad_norm)
    return run_case(case.model_copy(update={"engine": plain, "save_to": None, **changes}))


def _compare(case: RehearsalCase, reports: Sequence[RankReport]) -> float:
    """The largest difference of a loss from one process's; in fp32 gradient norms are compared too."""
    alone, precision = _one_process(case), case.engine.precision
    difference = 0.0
    for rank, report in enumerate(reports):
        for step, (found, wanted) in enumerate(zip(report.losses, alone.losses, strict=True)):
            _require_close(f"rank {rank}, step {step}: the loss in {precision}", found, wanted, TOLERANCE[precision])
            difference = max(difference, abs(found - wanted))
        if precision == "fp32":
            for step, (found, wanted) in enumerate(zip(report.grad_norms, alone.grad_norms, strict=True)):
                _require_close(f"rank {rank}, step {step}: the gradient norm", found, wanted, TOLERANCE[precision])
    return difference


def _require_close(what: str, found: float, wanted: float, tolerance: float) -> None:
    # Not `difference > tolerance`: what is not a number must not pass.
    if not abs(found - wanted) <= tolerance * max(1.0, abs(wanted)):
        raise LaunchError(
            f"{what} is {found:.7f}, one process has {wanted:.7f} (tolerance {tolerance:g}): the layout computes "
            "something else; please report this"
        )


def _check_bytes(case: RehearsalCase, reports: Sequence[RankReport], world_size: int) -> list[tuple[int, int]]:
    """(weights, optimizer) of every rank, equal to what the plan counts for its place."""
    if case.adapter is not None:
        return []
    found = []
    for rank, report in enumerate(reports):
        planned = held_bytes(case.engine, case.model, case.optim, world_size, report.pp_rank, report.dp_rank)
        held = report.held["weights"], report.held["optimizer"]
        if held != (planned.weights, planned.optimizer):
            raise LaunchError(
                f"rank {rank} allocates {held[0]:,} bytes of weights and {held[1]:,} of optimizer; the plan counts "
                f"{planned.weights:,} and {planned.optimizer:,}; please report this"
            )
        found.append(held)
    return found


def _resume(case: RehearsalCase, report: RankReport, directory: Path) -> float:
    """One process goes on from the ranks' checkpoint; the largest difference of a loss from theirs."""
    (checkpoint,) = directory.glob("step-*")
    # A process that loads nothing would give the losses of the first steps.
    alone = _one_process(case, resume_from=str(checkpoint))
    wanted = report.losses[-len(alone.losses) :]
    for step, (found, loss) in enumerate(zip(alone.losses, wanted, strict=True)):
        _require_close(f"step {step} after the ranks' checkpoint: the loss", found, loss, TOLERANCE["fp32"])
    return max(abs(found - loss) for found, loss in zip(alone.losses, wanted, strict=True))


def _spawn(cases: Sequence[RehearsalCase], world_size: int) -> list[list[RankReport]]:
    """The ranks as processes on this machine; one rank needs none."""
    if world_size == 1:
        return [run_cases(list(cases))]
    with tempfile.TemporaryDirectory(prefix="hcx-ranks-") as directory:
        write_cases(Path(directory), list(cases))
        code = run_local_ranks([sys.executable, "-m", "hcx.launch.rehearsal_case", directory], world_size)
        if code:
            raise LaunchError(f"a rank of the rehearsal ended with exit code {code}; its own message stands above")
        return read_reports(Path(directory), world_size)
