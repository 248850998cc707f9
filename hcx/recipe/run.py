"""Running a training recipe: shards and weights in, metrics, checkpoints and a model directory out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from hcx.artifacts import Input, artifact_input, is_complete, new_artifact, read_manifest
from hcx.artifacts.manifest import write_atomically
from hcx.compress.regularise import write_packed_model
from hcx.config import dump_yaml
from hcx.dist import init_process_group, process_environment, rehearsal, seed_everything
from hcx.dist.rendezvous import leave_together
from hcx.engine.base import Engine
from hcx.engine.build import build_engine
from hcx.errors import CheckpointError, ConfigError
from hcx.model.config import ModelConfig
from hcx.model.convert.hf import export_hf
from hcx.model.flops import peak_flops, training_flops_per_token
from hcx.model.load import ModelFiles
from hcx.model.transforms import ModelTransform
from hcx.model.weights import InitWeights, TensorWeights, WeightsProvider
from hcx.obs import get_logger, make_sinks
from hcx.recipe.adapt import adapter_transforms, export_adapter_run
from hcx.recipe.attempts import FINISHED, START, endings_in_the_log, start_details
from hcx.recipe.checks import check_recipe
from hcx.recipe.convert import DTYPES
from hcx.recipe.data import RunData, open_data
from hcx.recipe.drop import dropbp_transforms
from hcx.recipe.regularise import export_flexor, planes_of, regularise_transforms
from hcx.recipe.train import ChatSection, TrainRecipe
from hcx.tokenizer import Tokenizer
from hcx.tokenizer.codec import TOKENIZER_JSON
from hcx.train import (
    CheckpointReader,
    Trainer,
    TrainResult,
    build_objective,
    find_checkpoint,
    latest_checkpoint,
    open_checkpoint,
)
from hcx.train.endings import one_ending

log = get_logger(__name__)


def run_training(
    recipe: TrainRecipe,
    resume: str = "auto",
    stop: Callable[[], str | None] | None = None,
    extra: Sequence[ModelTransform] = (),
) -> TrainResult:
    """Trains as the recipe says, in this process and those started with it.

    Args:
        recipe: the run.
        resume: `auto` (the newest checkpoint of the run, if there is one), `never`, or a checkpoint directory.
        stop: asked before each step; a reason ends the run as resumable.
        extra: methods that no recipe names (baselines of benchmarks), before DropBP.

    Raises:
        HcxError: something of the user's does not fit.
        PeerLost: another process is gone; the run is resumable.
    """
    rank, world_size, _ = process_environment()
    with one_ending(recipe.out, rank, world_size):
        return _run_training(recipe, resume, stop, extra, rank, world_size)


def _run_training(
    recipe: TrainRecipe,
    resume: str,
    stop: Callable[[], str | None] | None,
    extra: Sequence[ModelTransform],
    rank: int,
    world_size: int,
) -> TrainResult:
    check_recipe(recipe, world_size)
    data = open_data(recipe)
    if recipe.model.vocab_size != data.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {recipe.model.vocab_size}: the tokenizer of {data.tokenizer_of} has "
            f"{data.vocab_size} entries; set model.vocab_size={data.vocab_size}"
        )
    _check_base(recipe, data)
    out = Path(recipe.out)
    if recipe.engine.kind == "megatron" and not torch.cuda.is_available():
        log.info("no CUDA device: Megatron-core's CUDA calls are redirected to the CPU (rehearsal)")
        rehearsal.enable()
    init_process_group()
    reader = _find_checkpoint(out, resume)
    seed_everything(recipe.seed)
    inputs = list(data.inputs)
    if recipe.init_from is not None:
        inputs.append(artifact_input("model", recipe.init_from))
    transforms = [
        *adapter_transforms(recipe),
        *regularise_transforms(recipe),
        *extra,
        *dropbp_transforms(recipe),
    ]
    engine = build_engine(recipe.engine, recipe.model, recipe.optim, transforms, _weights(recipe), recipe.seed)
    sinks = []
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        start = start_details(out, world_size)
        write_atomically(out / "recipe.yaml", dump_yaml(recipe).encode())
        sinks = make_sinks(
            out, recipe.tracking, recipe.model_dump(mode="json"), resume_step=reader.step if reader else -1
        )
        for sink in sinks:
            sink.event(reader.step if reader else 0, START, start)
    dtype = DTYPES[recipe.engine.precision]
    trainer = Trainer(
        recipe.train,
        engine,
        data.loader,
        build_objective(recipe.loss),
        recipe.optim.schedule,
        out,
        validation=data.validation,
        transforms=transforms,
        sinks=sinks,
        callbacks=data.callbacks,
        resolved=recipe,
        inputs=inputs,
        flops_per_token=_flops_per_token(recipe),
        peak_flops=peak_flops(engine.device, dtype) if rank == 0 else 0.0,
        stop=stop,
        prefetch=recipe.data.prefetch,
        stages=() if isinstance(recipe.data, ChatSection) else recipe.stages,
    )
    try:
        with endings_in_the_log(sinks, lambda: trainer.step), one_ending(out, rank, world_size):
            if reader is not None:
                trainer.resume(reader)
            result = trainer.run()
            if result.finished and recipe.adapter is not None:
                if rank == 0:
                    export_adapter_run(recipe, out, data, _final_checkpoint(out), inputs)
            elif result.finished:
                _export(recipe, engine, out, data, trainer, inputs, rank)
        for sink in sinks if result.finished else ():
            sink.event(result.step, FINISHED, {})
    finally:
        for sink in sinks:
            sink.close()
        engine.close()
    leave_together(rank)
    return result


def _check_base(recipe: TrainRecipe, data: RunData) -> None:
    """The model that a run starts from must read the ids of its data as they were written."""
    if recipe.init_from is None or not (Path(recipe.init_from) / TOKENIZER_JSON).is_file():
        return
    digest = Tokenizer.load(recipe.init_from).digest
    if digest != data.tokenizer_digest:
        raise ConfigError(
            f"init_from = {recipe.init_from}: its tokenizer.json (digest {digest[:19]}) is not that of the data "
            f"({data.tokenizer_of}, {data.tokenizer_digest[:19]}); make the data with the model's tokenizer"
        )


def _flops_per_token(recipe: TrainRecipe) -> Callable[[int], float] | None:
    """Of a trained token; None where trained tokens are not the computed ones, or many weights get no gradient."""
    if isinstance(recipe.data, ChatSection) or recipe.adapter is not None or recipe.dropbp is not None:
        return None
    return partial(training_flops_per_token, recipe.model)


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
    _tell_differences(recipe, files.config)
    return TensorWeights(files.weight, recipe.init_from)


def _tell_differences(recipe: TrainRecipe, stated: ModelConfig) -> None:
    """A changed context length is a plan; other numbers that no shape betrays make another model of the weights."""
    silent = ("norm_eps", "tie_embeddings", "attention_multiplier", "residual_multiplier", "embedding_multiplier")
    for name in (*silent, "logits_scaling", "use_post_norm", "rope_theta"):
        mine, theirs = getattr(recipe.model, name), getattr(stated, name)
        if mine != theirs:
            log.warning("model.%s = %s, but %s was made with %s", name, mine, recipe.init_from, theirs)


def _final_checkpoint(out: Path) -> Path:
    final = latest_checkpoint(out / "checkpoints")
    if final is None:
        raise CheckpointError(f"{out / 'checkpoints'}: the final checkpoint is not there")
    return final


def _export(
    recipe: TrainRecipe,
    engine: Engine,
    out: Path,
    data: RunData,
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
    made_from = [artifact_input("checkpoint", _final_checkpoint(out)), *inputs]
    packed = planes_of(recipe, trainer.step)
    with new_artifact(out / "model", "model", recipe, made_from, overwrite=is_complete(out / "model")) as artifact:
        dtype: torch.dtype = DTYPES[recipe.export.dtype]
        if recipe.flexor is not None:
            export_flexor(recipe, artifact.path, dict(tensors), data.tokenizer_of)
        elif packed:
            write_packed_model(artifact.path, recipe.final_model, tensors, packed, data.tokenizer_of, dtype)
        else:
            export_hf(artifact.path, recipe.final_model, tensors, data.tokenizer_of, dtype)
        data.write_tokenizer(artifact.path)
        artifact.counts = {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "tokenizer_digest": data.tokenizer_digest,
            **({"conversations": dict(data.counts)} if data.counts else {}),
        }
    log.info("model %s (%s)", out / "model", read_manifest(out / "model").config_digest[:12])
