"""The training recipe: everything that decides what a run computes, in one YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from hcx.config import Config, load_config
from hcx.data.fim import FimConfig
from hcx.engine.config import EngineConfig, TorchEngineConfig
from hcx.model.config import ModelConfig
from hcx.obs import TrackingConfig
from hcx.optim import OptimConfig
from hcx.train.config import TrainerConfig
from hcx.train.stages import Stage, plan_stages


class DataSection(Config):
    """Which text, in which shares."""

    shards: str
    """Directory of packed shards (`hcx data build`)."""
    seq_len: int
    """Tokens per row."""
    shares: dict[str, float] | None = None
    """Share of the rows by language; what the shards were built with if not given."""
    upsample: dict[str, float] | None = None
    """How often the documents of a source come in an epoch, by source; what the shards were built with for the
    others."""
    fim: FimConfig | None = None
    """Rearrange documents so that the model learns to fill in the middle; null: none."""
    prefetch: int = 1
    """Threads that prepare batches ahead, 0 for none; the order does not depend on it."""


class ValidationSection(Config):
    """How held-out text is scored."""

    seq_len: int | None = None
    """Tokens per row; `data.seq_len` if not given."""
    micro_batch: int = 8
    """Rows per forward."""
    max_documents: int | None = None
    """Held-out documents per language; all if not given."""


class ExportSection(Config):
    """The model directory written at the end."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the written weights."""


class TrainRecipe(Config):
    """A training run."""

    name: str
    """Names the run for people."""
    out: str
    """Directory of the run: metrics, checkpoints, the exported model."""
    model: ModelConfig
    """The decoder."""
    init_from: str | None = None
    """A MODEL directory whose weights the run starts from; random if not given."""
    seed: int = 0
    """Of initial weights and the order of the data."""
    data: DataSection
    """The text."""
    train: TrainerConfig
    """Length, batch, intervals."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    engine: EngineConfig = Field(default_factory=TorchEngineConfig)
    """What runs the steps."""
    validation: ValidationSection = ValidationSection()
    """Scoring of held-out text."""
    export: ExportSection = ExportSection()
    """The model directory."""
    tracking: TrackingConfig = TrackingConfig()
    """Mirrors of the metrics."""

    @property
    def data_parallel(self) -> int:
        """Model replicas that the recipe asks for."""
        return self.engine.data_parallel or 1

    @property
    def world_size(self) -> int:
        """Processes that the recipe needs."""
        if self.engine.kind == "megatron":
            return self.engine.tensor_parallel * self.engine.pipeline_parallel * self.data_parallel
        return self.data_parallel

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The run's stages in steps and rows; one if the recipe names none."""
        train, data = self.train, self.data
        return plan_stages(
            train.stages, train.steps, train.global_batch, train.micro_batch, data.seq_len, self.model.rope_theta
        )

    @property
    def final_model(self) -> ModelConfig:
        """The decoder as the last stage leaves it."""
        return self.model.model_copy(update={"rope_theta": self.stages[-1].rope_theta})


def load_train_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainRecipe:
    """Reads a recipe with `key=value` overrides applied.

    Raises:
        ConfigError: naming the key path, the value and what is allowed.
    """
    return load_config(TrainRecipe, path, overrides)
