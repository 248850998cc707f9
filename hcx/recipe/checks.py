"""Rules between the parts of a recipe, as one list of named checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from hcx.compress.alphatuning import AlphaTuningConfig, tuned_stems
from hcx.data.token_budget import rounded_up
from hcx.dropbp import uneven_stages
from hcx.engine.config import MegatronEngineConfig
from hcx.engine.legality import explain, violations
from hcx.errors import ConfigError, HcxError
from hcx.model.adapters import target_stems
from hcx.model.load import ModelFiles
from hcx.obs import get_logger
from hcx.recipe.regularise import flexor_fits, regularise_fits
from hcx.recipe.train import ChatSection, TrainRecipe

log = get_logger(__name__)

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
    if isinstance(recipe.data, ChatSection):
        yield "train.stages: rows of conversations have their own lengths; stages go with data.kind = shards"
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
        count = _micro_batches(stage.global_batch, stage.micro_batch)
        for problem in violations(recipe.engine, recipe.model, world_size, stage.seq_len, micro_batches=count):
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


def _conversations_fit(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    data = recipe.data
    if not isinstance(data, ChatSection):
        return
    if not data.sources:
        yield "data.sources is empty: name at least one file of conversations"
    if data.tokenizer is None and recipe.init_from is None:
        yield "data.tokenizer: conversations need a tokenizer; name its directory, or a model by init_from"
    for key, value in (("data.window", data.window), ("data.multiple", data.multiple)):
        if value < 1:
            yield f"{key} = {value}: must be at least 1"
    if not 0 <= data.validation_fraction < 1:
        yield f"data.validation_fraction = {data.validation_fraction}: must be from 0 to below 1"
    longest = rounded_up(data.seq_len, max(1, data.multiple))
    if longest > recipe.train.micro_batch:
        yield (
            f"train.micro_batch = {recipe.train.micro_batch}: counts tokens with data.kind = chat, and a conversation "
            f"of data.seq_len = {data.seq_len} tokens does not fit it; nearest: {longest}"
        )
    engine = recipe.engine
    if isinstance(engine, MegatronEngineConfig) and engine.sequence_parallel and data.multiple % engine.tensor_parallel:
        yield (
            f"data.multiple = {data.multiple}: with engine.sequence_parallel, row lengths are split over "
            f"engine.tensor_parallel = {engine.tensor_parallel}; use a multiple of it"
        )


def _objective_suits(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    if recipe.loss.kind == "sft" and not isinstance(recipe.data, ChatSection):
        yield "objective.kind = sft: text has no assistant's turns; use data.kind = chat, or kind = next_token"


def _adapter_has_a_base(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    if recipe.adapter is None:
        return
    if recipe.init_from is None:
        yield "adapter: it goes on top of a trained model; name it by init_from"
    try:
        if not isinstance(recipe.adapter, AlphaTuningConfig):
            target_stems(recipe.adapter.targets, recipe.model)
        elif recipe.init_from is not None and Path(recipe.init_from).is_dir():
            with ModelFiles(recipe.init_from) as files:
                tuned_stems(recipe.adapter, files)
    except HcxError as error:
        yield str(error)
    if isinstance(recipe.adapter, AlphaTuningConfig) and isinstance(recipe.data, ChatSection) and recipe.data.preamble:
        yield (
            "data.preamble with adapter.kind = alphatuning: a task file holds scales only, so the chat format stays "
            "that of the model; remove the preamble, or use adapter.kind = lora"
        )


def _dropbp_fits(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    if recipe.dropbp is None:
        return
    engine, pipeline, chunks = recipe.engine, 1, 1
    if isinstance(engine, MegatronEngineConfig):
        pipeline, chunks = engine.pipeline_parallel, engine.virtual_pipeline_parallel
    stages, sublayers = recipe.dropbp.stages or pipeline * chunks, recipe.model.num_sublayers
    if sublayers % stages:
        yield f"dropbp.stages = {stages}: does not divide the model's {sublayers} residual sublayers"
    elif (problem := uneven_stages(stages, pipeline, chunks)) is not None:
        yield problem
    if recipe.init_from is None:
        log.warning("dropbp: meant for fine-tuning a trained model; this run starts from random weights")


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


def _layout_is_legal(recipe: TrainRecipe, world_size: int) -> Iterator[str]:
    seq_len = None if isinstance(recipe.data, ChatSection) else recipe.data.seq_len
    # Stages of the run have micro-batches of their own, which are checked with them.
    count = None if recipe.train.stages else _micro_batches(recipe.train.global_batch, recipe.train.micro_batch)
    yield from explain(recipe.engine, recipe.model, world_size, seq_len, recipe.optim.kind, count)


def _micro_batches(global_batch: int, micro_batch: int) -> int | None:
    """Micro-batches of a step over all replicas; None where the batch does not divide, which is refused elsewhere."""
    return global_batch // micro_batch if micro_batch > 0 and global_batch % micro_batch == 0 else None


CHECKS: dict[str, Check] = {
    "lengths are positive": _lengths,
    "the batch divides into micro-batches and replicas": _batch_divides,
    "rows fit the model": _sequence_fits,
    "stages fit the model and the batch": _stages_fit,
    "conversations fit a micro-batch": _conversations_fit,
    "the objective suits the data": _objective_suits,
    "an adapter has a base": _adapter_has_a_base,
    "dropped sublayers divide into stages": _dropbp_fits,
    "regularisation fits the run, the model and the engine": regularise_fits,
    "FleXOR fits the model and the engine": flexor_fits,
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
