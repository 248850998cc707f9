"""The training recipe: everything that decides what a run computes, in one YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hcx.compress.alphatuning import AlphaTuningConfig
from hcx.compress.flexor import FlexorConfig
from hcx.compress.regularise import RegulariseConfig
from hcx.config import Config, apply_overrides, decode, resolve_extends
from hcx.data.chat_rows import ChatSource
from hcx.data.fim import FimConfig
from hcx.dropbp.config import DropBPConfig
from hcx.engine.config import EngineConfig, TorchEngineConfig
from hcx.model.adapters import LoRAConfig
from hcx.model.config import ModelConfig
from hcx.model.load import ModelFiles
from hcx.obs import TrackingConfig
from hcx.optim import OptimConfig
from hcx.train.config import TrainerConfig
from hcx.train.objectives import NextTokenConfig, ObjectiveConfig, SFTConfig
from hcx.train.stages import Stage, plan_stages


class DataSection(Config):
    """Packed text, in which shares."""

    kind: Literal["shards"] = "shards"
    """May be left out."""
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


class ChatSection(Config):
    """Conversations, batched whole under a token budget: `train.global_batch` and `train.micro_batch` count tokens."""

    kind: Literal["chat"] = "chat"
    sources: tuple[ChatSource, ...]
    """Files of conversations, in order; relative paths start where the command runs, or name shipped files."""
    seq_len: int
    """Tokens of a conversation at most."""
    tokenizer: str | None = None
    """A directory with a tokenizer; the model's of `init_from` if not given."""
    preamble: str = ""
    """Opens every conversation that has no system text; the exported model's chat format then does the same."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """A longer conversation loses its last turns, whole, or is left out."""
    validation_fraction: float = 0.02
    """Share of the conversations that is held out, by their content; 0 with `validation`, which names files."""
    validation: tuple[ChatSource, ...] = ()
    """Files of held-out conversations."""
    window: int = 4096
    """Conversations among which lengths are grouped: a larger one fills less and mixes less."""
    multiple: int = 8
    """Rows are as long as the longest conversation of their step, rounded up to a multiple of this."""
    prefetch: int = 1
    """Threads that prepare batches ahead, 0 for none; the order does not depend on it."""


AnyDataSection = Annotated[DataSection | ChatSection, Field(discriminator="kind")]


AnyAdapter = Annotated[LoRAConfig | AlphaTuningConfig, Field(discriminator="kind")]


class ValidationSection(Config):
    """How held-out text is scored."""

    seq_len: int | None = None
    """Tokens per row; `data.seq_len` if not given. Conversations are scored whole."""
    micro_batch: int = 8
    """Rows per forward; conversations go by the token budget of training."""
    max_documents: int | None = None
    """Held-out documents per language, or conversations per source; all if not given."""


class ExportSection(Config):
    """The model directory written at the end; of an adapter's run, the adapter directory too."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the written weights."""
    merged: bool = True
    """Write the model with the adapter merged into its weights, unless those are binary-coded."""


class TrainRecipe(Config):
    """A training run."""

    name: str
    """Names the run for people."""
    out: str
    """Directory of the run: metrics, checkpoints, the exported model."""
    model: ModelConfig
    """The decoder; read from `init_from` if left out."""
    init_from: str | None = None
    """A MODEL directory whose weights the run starts from; random if not given. Binary-coded ones stay packed and
    frozen under an `adapter`."""
    seed: int = 0
    """Of initial weights and the order of the data."""
    data: AnyDataSection
    """The text, or conversations (`kind: chat`)."""
    objective: ObjectiveConfig | None = None
    """The loss; what suits the data if not given: `next_token` for text, `sft` for conversations."""
    adapter: AnyAdapter | None = None
    """What is trained on top of the frozen model of `init_from`: low-rank updates (`kind: lora`), or the scales of its
    binary-coded layers (`kind: alphatuning`); all weights if not given."""
    regularise: RegulariseConfig | None = None
    """Compress the masters every so many steps, so that the run ends in a compressed model; null: never."""
    flexor: FlexorConfig | None = None
    """Train the linear layers as keys of XOR networks, at a fraction of a bit per weight; null: as they are."""
    dropbp: DropBPConfig | None = None
    """Drop the backward of random sublayers while fine-tuning; null: none."""
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
    def loss(self) -> NextTokenConfig | SFTConfig:
        """The objective, resolved."""
        if self.objective is not None:
            return self.objective
        return SFTConfig() if isinstance(self.data, ChatSection) else NextTokenConfig()

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
    """Reads a recipe with `key=value` overrides applied; a recipe without `model` takes the one of `init_from`.

    Raises:
        ConfigError: naming the key path, the value and what is allowed.
        CheckpointError: `init_from` is needed for the model's shape and is no model directory.
    """
    values = apply_overrides(resolve_extends(path), overrides)
    data = values.get("data")
    if isinstance(data, Mapping) and "kind" not in data:
        values = {**values, "data": {"kind": "shards", **data}}
    adapter = values.get("adapter")
    if isinstance(adapter, Mapping) and "kind" not in adapter:
        values = {**values, "adapter": {"kind": "lora", **adapter}}
    if "model" not in values and isinstance(values.get("init_from"), str):
        with ModelFiles(values["init_from"]) as files:
            values = {**values, "model": files.config.model_dump()}
    return decode(TrainRecipe, values, str(path))
