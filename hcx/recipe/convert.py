"""Checkpoints and model directories to Hugging Face directories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hcx.artifacts import artifact_input, is_complete, new_artifact, read_manifest
from hcx.artifacts.manifest import MANIFEST
from hcx.data.shards import TOKENIZER_FOLDER
from hcx.errors import CheckpointError
from hcx.model.config import ModelConfig
from hcx.model.convert.hf import export_hf
from hcx.model.load import ModelFiles, iter_tensors
from hcx.train import CheckpointReader


def convert_model(source: Path, destination: Path, dtype: torch.dtype, manifest: bool = True) -> None:
    """Writes a full-precision model directory.

    Args:
        source: a model directory (full precision or BCQ) or a checkpoint directory.
        destination: must not exist.
        dtype: of the written weights.
        manifest: keep `manifest.json` in the result.

    Raises:
        CheckpointError: the source is neither.
    """
    tokenizer: Path | None
    if (source / "config.json").is_file():
        with ModelFiles(source) as files:
            config = files.config
        tensors: Iterator[tuple[str, Tensor]] = iter_tensors(source)
        tokenizer = source if (source / "tokenizer.json").is_file() else None
    elif is_complete(source) and read_manifest(source).kind == "checkpoint":
        stated = read_manifest(source).config
        reader = CheckpointReader(source)
        # Of a run in stages, the base of the rotary embedding is that of the stage it was in.
        changed = reader.trainer_state.get("model", {})
        config = ModelConfig.model_validate(stated["model"] | changed, strict=False)
        tensors = ((name, reader.read(name, "master")) for name in reader.names())
        shards = Path(stated.get("data", {}).get("shards", ""))
        tokenizer = shards / TOKENIZER_FOLDER if is_complete(shards) else None
    else:
        raise CheckpointError(f"{source}: neither a model directory (config.json) nor a complete checkpoint")
    with new_artifact(destination, "model", {"dtype": str(dtype)}, [artifact_input("model", source)]) as artifact:
        export_hf(artifact.path, config, tensors, tokenizer, dtype)
    if not manifest:
        (destination / MANIFEST).unlink()
