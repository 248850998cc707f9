"""From a configuration to an engine; a library is imported only for the engine that needs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from hcx.dist import process_environment
from hcx.engine.base import Engine
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.engine.legality import require_legal
from hcx.errors import MissingExtra
from hcx.model.config import ModelConfig
from hcx.model.transforms import ModelTransform
from hcx.model.weights import WeightsProvider
from hcx.optim import OptimConfig


def build_engine(
    engine_config: TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig,
    model_config: ModelConfig,
    optim_config: OptimConfig,
    transforms: Sequence[ModelTransform],
    weights: WeightsProvider,
    seed: int,
) -> Engine:
    """Builds the engine of this process; collective over all processes.

    Raises:
        ConfigError: the layout is not legal for this model and number of processes.
        MissingExtra: the engine's library is not installed.
    """
    _, world_size, _ = process_environment()
    require_legal(engine_config, model_config, world_size, optimizer=optim_config.kind)
    package = {"deepspeed": "deepspeed", "megatron": "megatron"}.get(engine_config.kind)
    if package is not None and find_spec(package) is None:
        raise MissingExtra(
            "megatron-core" if package == "megatron" else package,
            engine_config.kind,
            f"engine.kind = {engine_config.kind}",
        )
    kind: type[Engine]
    if isinstance(engine_config, DeepSpeedEngineConfig):
        # Left to itself, the library warns that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        from hcx.engine.deepspeed_engine import DeepSpeedEngine as kind
    elif isinstance(engine_config, MegatronEngineConfig):
        from hcx.engine.megatron_engine import MegatronEngine as kind
    else:
        from hcx.engine.torch_engine import TorchEngine as kind
    return kind(
        engine_config=engine_config,  # type: ignore[call-arg]
        model_config=model_config,
        optim_config=optim_config,
        transforms=transforms,
        weights=weights,
        seed=seed,
    )
