"""Running a training recipe: shards and weights in, metrics, checkpoints and a model directory out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from hcx.artifacts import Input, artifact_input, is_complete, new_artifact, read_manifest
from hcx.artifacts.manifest import write_atomically
from hcx.config import dump_yaml
from hcx.data import PackedLoader, ShardSet, validation_batches, validation_bytes
from hcx.data.shards import TOKENIZER_FOLDER
from hcx.dist import init_process_group, process_environment, rehearsal, seed_everything
from hcx.engine.base import Engine
from hcx.engine.build import build_engine
from hcx.errors import CheckpointError, ConfigError
from hcx.model.convert.hf import export_hf
from hcx.model.flops import peak_flops, training_flops_per_token
from hcx.model.load import ModelFiles
from hcx.model.weights import InitWeights, TensorWeights, WeightsProvider
from hcx.obs import get_logger, make_sinks
from hcx.recipe.checks import check_recipe
from hcx.recipe.train import TrainRecipe
from hcx.train import (
    CheckpointReader,
    NextToken,
    StagedLoader,
    Trainer,
    TrainResult,
    find_checkpoint,
    latest_checkpoint,
    open_checkpoint,
)
from hcx.train.loader import Loader
from hcx.train.validation import ValidationSet

log = get_logger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_training(
    recipe: TrainRecipe, resume: str = "auto", stop: Callable[[], str | None] | None = None
) -> TrainResult:
    """Trains as the recipe says, in this process and those started with it.

    Args:
        recipe: the run.
        resume: `auto` (the newest checkpoint of the run, if there is one), `never`, or a checkpoint directory.
        stop: asked before each step; a reason ends the run as resumable.

    Raises:
        HcxError: something of the user's does not fit.
    """
    rank, world_size, _ = process_environment()
    check_recipe(recipe, world_size)
    shards = ShardSet.open(recipe.data.shards)
    if recipe.model.vocab_size != shards.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {recipe.model.vocab_size}: the tokenizer of {recipe.data.shards} has "
            f"{shards.vocab_size} entries; set model.vocab_size={shards.vocab_size}"
        )
    out = Path(recipe.out)
    if recipe.engine.kind == "megatron" and not torch.cuda.is_available():
        log.info("no CUDA device: Megatron-core's CUDA calls are redirected to the CPU (rehearsal)")
        rehearsal.enable()
    init_process_group()
    reader = _find_checkpoint(out, resume)
    seed_everything(recipe.seed)
    inputs = [artifact_input("shards", recipe.data.shards)]
    if recipe.init_from is not None:
        inputs.append(artifact_input("model", recipe.init_from))
    engine = build_engine(recipe.engine, recipe.model, recipe.optim, (), _weights(recipe), recipe.seed)
    data, stages = recipe.data, recipe.stages
    loaders = [
        PackedLoader(shards, "train", stage.seq_len, recipe.seed, data.shares, data.upsample, data.fim)
        for stage in stages
    ]
    loader: Loader = StagedLoader(stages, loaders) if recipe.train.stages else loaders[0]
    sinks = []
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "recipe.yaml", dump_yaml(recipe).encode())
        sinks = make_sinks(
            out, recipe.tracking, recipe.model_dump(mode="json"), resume_step=reader.step if reader else -1
        )
    dtype = DTYPES[recipe.engine.precision]
    trainer = Trainer(
        recipe.train,
        engine,
        loader,
        NextToken(),
        recipe.optim.schedule,
        out,
        validation=validation_sets(recipe, shards),
        sinks=sinks,
        resolved=recipe,
        inputs=inputs,
        flops_per_token=partial(training_flops_per_token, recipe.model),
        peak_flops=peak_flops(engine.device, dtype) if rank == 0 else 0.0,
        stop=stop,
        prefetch=recipe.data.prefetch,
        stages=stages,
    )
    try:
        if reader is not None:
            trainer.resume(reader)
        result = trainer.run()
        if result.finished:
            _export(recipe, engine, out, shards, trainer, inputs, rank)
    finally:
        for sink in sinks:
            sink.close()
        engine.close()
    return result


def _find_checkpoint(out: Path, resume: str) -> CheckpointReader | None:
    if resume not in ("auto", "never"):
        return open_checkpoint(resume)
    if resume == "auto":
        return find_checkpoint(out / "checkpoints")
    if latest_checkpoint(out / "checkpoints") is not None:
        raise ConfigError(
            f"--resume never, but {out} holds checkpoints; choose another directory (out=DIR) or remove it yourself"
        )
    return None


def _weights(recipe: TrainRecipe) -> WeightsProvider:
    if recipe.init_from is None:
        return InitWeights(recipe.model, recipe.seed)
    files = ModelFiles(recipe.init_from)
    return TensorWeights(files.weight, recipe.init_from)


def validation_sets(recipe: TrainRecipe, shards: ShardSet) -> list[ValidationSet]:
    """The held-out rows of every language that has some."""
    seq_len = recipe.validation.seq_len or recipe.data.seq_len
    sets = []
    for language in shards.languages:
        limit = recipe.validation.max_documents
        if shards.shard(language, "validation").num_documents == 0:
            continue
        rows = list(validation_batches(shards, language, seq_len, recipe.validation.micro_batch, limit))
        sets.append(ValidationSet(language, rows, validation_bytes(shards, language, limit)))
    return sets


def _export(
    recipe: TrainRecipe,
    engine: Engine,
    out: Path,
    shards: ShardSet,
    trainer: Trainer,
    inputs: list[Input],
    rank: int,
) -> None:
    """Writes `OUT/model`; every rank takes part in reading the state."""
    tensors = engine.export_state()
    if rank != 0:
        for _ in tensors:
            pass
        return
    final = latest_checkpoint(out / "checkpoints")
    if final is None:
        raise CheckpointError(f"{out / 'checkpoints'}: the final checkpoint is not there")
    made_from = [artifact_input("checkpoint", final), *inputs]
    with new_artifact(out / "model", "model", recipe, made_from, overwrite=is_complete(out / "model")) as artifact:
        tokenizer = shards.directory / TOKENIZER_FOLDER
        export_hf(artifact.path, recipe.final_model, tensors, tokenizer, DTYPES[recipe.export.dtype])
        artifact.counts = {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "tokenizer_digest": shards.tokenizer_digest,
        }
    log.info("model %s (%s)", out / "model", read_manifest(out / "model").config_digest[:12])
