"""Runs that compress while they train: the transforms, the planes at the end, and what cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hcx.compress.flexor import Flexor, check_flexor, packed_of
from hcx.compress.regularise import (
    PlaneStore,
    Regularise,
    RegulariseConfig,
    check_plan,
    matrix_shapes,
    write_packed_model,
)
from hcx.compress.regularise.config import PACKED_RULES, BCQRule, LowRankRule, PruneRule, UniformRule
from hcx.engine.config import MegatronEngineConfig
from hcx.kernels import PackedWeight
from hcx.model.transforms import ModelTransform
from hcx.optim import lr_factor
from hcx.recipe.convert import DTYPES
from hcx.recipe.train import TrainRecipe

PLANES = "planes"
"""Folder of a run that receives the planes of its last event."""


def regularise_transforms(recipe: TrainRecipe) -> list[ModelTransform]:
    """What compresses on the way: events on the masters, or layers of another form; nothing for other runs."""
    if recipe.flexor is not None:
        return [Flexor(recipe.flexor, recipe.seed, recipe.optim.schedule.warmup_steps)]
    if recipe.regularise is None:
        return []
    steps, schedule = recipe.train.steps, recipe.optim.schedule

    def factor(step: int) -> float:
        return lr_factor(schedule, step, steps)

    return [
        Regularise(
            recipe.regularise,
            recipe.model,
            steps,
            lr=lambda step: recipe.optim.lr * factor(step),
            lr_factor=factor,
            lr_warmup_steps=schedule.warmup_steps,
            seed=recipe.seed,
            store=PlaneStore(Path(recipe.out) / PLANES),
        )
    ]


def planes_of(recipe: TrainRecipe, step: int) -> dict[str, PackedWeight]:
    """The planes of a finished run's last event, module -> weight; empty where its rules have none."""
    if recipe.regularise is None or not has_planes(recipe.regularise, recipe):
        return {}
    return PlaneStore(Path(recipe.out) / PLANES).read(step)


def has_planes(config: RegulariseConfig, recipe: TrainRecipe) -> bool:
    """Whether the run ends in binary-coded weights."""
    return any(isinstance(rule, PACKED_RULES) for rule in config.rules(list(matrix_shapes(recipe.model))).values())


def flexor_fits(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    """What cannot run of FleXOR, found before the first step."""
    config = recipe.flexor
    if config is None:
        return
    for name in ("adapter", "regularise"):
        if getattr(recipe, name) is not None:
            yield f"flexor beside {name}: the dense weights that {name} works on are gone; remove one of the sections"
    shapes = matrix_shapes(recipe.model)
    yield from check_flexor(config, list(shapes))
    if not isinstance(recipe.engine, MegatronEngineConfig) or recipe.engine.tensor_parallel < 2:
        return
    tp, told = recipe.engine.tensor_parallel, set()
    for stem, shape in shapes.items():
        if config.n_in_of(stem) is None or not stem.endswith((".o_proj", ".down_proj")) or shape[1] % tp:
            continue
        local, group = shape[1] // tp, min(config.group_size, shape[1])
        if (local % config.n_out or (group < shape[1] and local % group)) and local not in told:
            told.add(local)
            yield (
                f"flexor with engine.tensor_parallel = {tp}: slices of {config.n_out} and groups of {group} inputs "
                f"must divide the {local} inputs of {stem} on a rank"
            )


def export_flexor(recipe: TrainRecipe, directory: Path, engine_state: dict[str, Tensor], tokenizer: Path) -> None:
    """Fills a model directory with the planes that trained keys expand to."""
    assert recipe.flexor is not None
    packed, encoded = packed_of(recipe.flexor, engine_state, matrix_shapes(recipe.model))
    kept = [(name, tensor) for name, tensor in engine_state.items() if ".keys." not in name and ".scales." not in name]
    dtype: torch.dtype = DTYPES[recipe.export.dtype]
    write_packed_model(directory, recipe.final_model, kept, packed, tokenizer, dtype, encoded)


def regularise_fits(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    """What cannot run, found before the first step."""
    config = recipe.regularise
    if config is None:
        return
    if recipe.adapter is not None:
        yield (
            "regularise beside adapter: the weights of the base are frozen, and events would change them; remove one "
            "of the two sections"
        )
        return
    steps = recipe.train.steps
    key = "base_period" if config.period == "lr_scaled" else "period"
    if config.method == "period" and config.steps_between > steps:
        yield (
            f"regularise.{key} = {config.steps_between}: longer than the run, train.steps = {steps}, so that the only "
            f"event would be the last step (compress the finished model with hcx compress instead); at most {steps}"
        )
    warmup = recipe.optim.schedule.warmup_steps if config.warmup_steps is None else config.warmup_steps
    if warmup >= steps > 1:
        yield f"regularise.warmup_steps = {warmup}: no event would come before the last of train.steps = {steps}"
    shapes = matrix_shapes(recipe.model)
    yield from check_plan(config, shapes, recipe.model.tie_embeddings)
    chosen = config.rules(list(shapes))
    for rule in dict.fromkeys(chosen.values()):
        if isinstance(rule, PruneRule | LowRankRule) and warmup + rule.ramp_steps > steps:
            yield (
                f"regularise: ramp_steps = {rule.ramp_steps} of {rule.kind}, after {warmup} steps of warm-up, would "
                f"end after train.steps = {steps}"
            )
    if config.method == "straight_through" and isinstance(recipe.engine, MegatronEngineConfig):
        yield from _groups_stay_whole(config, shapes, recipe.engine.tensor_parallel)


def _groups_stay_whole(config: RegulariseConfig, shapes: dict[str, tuple[int, ...]], tp: int) -> Iterator[str]:
    """Straight-through layers compress what a rank holds; events see whole weights and need no rule like this."""
    told: set[tuple[int, int]] = set()
    for stem, rule in config.rules(list(shapes)).items():
        is_row_parallel = stem.endswith((".o_proj", ".down_proj"))
        if tp < 2 or not is_row_parallel or not isinstance(rule, BCQRule | UniformRule) or shapes[stem][1] % tp:
            continue
        local, group = shapes[stem][1] // tp, min(rule.group_size, shapes[stem][1])
        if local % group and (local, group) not in told:
            told.add((local, group))
            yield (
                f"regularise: method = straight_through with engine.tensor_parallel = {tp}: groups of {group} inputs "
                f"do not divide the {local} inputs of {stem} on a rank; choose a group_size that does, or method: "
                "period, whose events see whole weights"
            )
