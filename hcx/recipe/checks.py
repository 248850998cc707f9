"""Rules between the parts of a recipe, as one list of named checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hcx.engine.legality import violations
from hcx.errors import ConfigError
from hcx.recipe.train import TrainRecipe

Check = Callable[[TrainRecipe, int], Iterator[str]]


def _lengths(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    for key, value in (
        ("train.steps", recipe.train.steps),
        ("train.global_batch", recipe.train.global_batch),
        ("train.micro_batch", recipe.train.micro_batch),
        ("data.seq_len", recipe.data.seq_len),
        ("validation.micro_batch", recipe.validation.micro_batch),
    ):
        if value < 1:
            yield f"{key} = {value}: must be at least 1"
    for key, value in (
        ("train.validate_every", recipe.train.validate_every),
        ("train.checkpoint_every", recipe.train.checkpoint_every),
        ("train.keep_checkpoints", recipe.train.keep_checkpoints),
        ("train.keep_every", recipe.train.keep_every),
        ("data.prefetch", recipe.data.prefetch),
    ):
        if value < 0:
            yield f"{key} = {value}: must not be negative"
    if not recipe.train.watchdog_s >= 0:
        yield f"train.watchdog_s = {recipe.train.watchdog_s}: must not be negative; 0 turns it off"


def _stages_fit(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    if not recipe.train.stages or min(recipe.train.steps, recipe.train.global_batch, recipe.data.seq_len) < 1:
        return
    try:
        plan = recipe.stages
    except ConfigError as error:
        yield str(error)
        return
    for number, stage in enumerate(plan):
        key = f"train.stages.{number}"
        if stage.seq_len > recipe.model.max_seq_len:
            yield f"{key}.seq_len = {stage.seq_len}: longer than model.max_seq_len = {recipe.model.max_seq_len}"
        unit = stage.micro_batch * _replicas(recipe, world_size)
        if stage.micro_batch < 1 or stage.global_batch % unit:
            yield (
                f"{key}.seq_len = {stage.seq_len} makes {stage.global_batch} rows per step: must be a multiple of "
                f"micro_batch x replicas = {stage.micro_batch} x {unit // max(1, stage.micro_batch)}; set "
                f"{key}.micro_batch, or take a larger train.global_batch"
            )
        for problem in violations(recipe.engine, recipe.model, world_size, stage.seq_len):
            yield f"{key}: {problem}"


def _replicas(recipe: TrainRecipe, world_size: int) -> int:
    layout = recipe.world_size // recipe.data_parallel
    return recipe.engine.data_parallel or max(1, world_size // layout)


def _batch_divides(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    replicas = _replicas(recipe, world_size)
    unit = recipe.train.micro_batch * replicas
    if unit > 0 and recipe.train.global_batch % unit:
        nearest = max(1, round(recipe.train.global_batch / unit)) * unit
        yield (
            f"train.global_batch = {recipe.train.global_batch}: must be a multiple of train.micro_batch x replicas = "
            f"{recipe.train.micro_batch} x {replicas}; nearest: {nearest}"
        )


def _sequence_fits(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    for key, value in (("data.seq_len", recipe.data.seq_len), ("validation.seq_len", recipe.validation.seq_len)):
        if value is not None and value > recipe.model.max_seq_len:
            yield f"{key} = {value}: longer than model.max_seq_len = {recipe.model.max_seq_len}"


def _warmup_fits(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    if recipe.optim.schedule.warmup_steps >= recipe.train.steps > 1:
        yield (
            f"optim.schedule.warmup_steps = {recipe.optim.schedule.warmup_steps}: the run has only "
            f"train.steps = {recipe.train.steps}, so the learning rate would never reach its peak"
        )


def _optimizer_runs(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    if recipe.optim.mup is not None and recipe.optim.mup.width != recipe.model.hidden_size:
        yield f"optim.mup.width = {recipe.optim.mup.width}: must be model.hidden_size = {recipe.model.hidden_size}"
    if recipe.optim.kind == "muon" and recipe.engine.kind != "torch":
        yield (
            f"optim.kind = muon: updates whole matrices, which engine.kind = {recipe.engine.kind} shards; "
            "use adamw, or engine.kind = torch"
        )


def _layout_is_legal(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    yield from map(str, violations(recipe.engine, recipe.model, world_size, recipe.data.seq_len))


CHECKS: dict[str, Check] = {
    "lengths are positive": _lengths,
    "the batch divides into micro-batches and replicas": _batch_divides,
    "rows fit the model": _sequence_fits,
    "stages fit the model and the batch": _stages_fit,
    "the schedule fits the run": _warmup_fits,
    "the optimizer runs on the engine": _optimizer_runs,
    "the layout is legal": _layout_is_legal,
}


def check_recipe(recipe: TrainRecipe, world_size: int | None = None) -> None:
    """Runs every check.

    Args:
        recipe: decoded and valid in each part.
        world_size: processes at hand; what the recipe needs if not given.

    Raises:
        ConfigError: listing everything that is wrong, not only the first.
    """
    world_size = recipe.world_size if world_size is None else world_size
    problems = [problem for check in CHECKS.values() for problem in check(recipe, world_size)]
    if problems:
        raise ConfigError("\n  ".join(["the recipe cannot run:", *problems]) if len(problems) > 1 else problems[0])
