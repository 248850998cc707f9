"""Engine configuration: one model per kind, chosen by its tag."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hcx.config import Config


class EngineOptions(Config):
    """What every engine understands."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Working precision; masters, optimizer state and reductions are fp32 always."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    missing_gradients: Literal["zero", "skip"] = "zero"
    """What a parameter without gradient in a step means: a zero gradient, or no update."""
    clip_grad_norm: float = 1.0
    """Global gradient norm per clip group; 0 disables clipping."""
    compile: bool = False
    """Compile each sublayer with torch.compile."""


class TorchEngineConfig(EngineOptions):
    """Plain torch: one process or DDP. The readable baseline."""

    kind: Literal["torch"] = "torch"
    data_parallel: int | None = None
    """Model replicas; all processes if not given."""


class DeepSpeedEngineConfig(EngineOptions):
    """DeepSpeed ZeRO."""

    kind: Literal["deepspeed"] = "deepspeed"
    data_parallel: int | None = None
    """Model replicas; all processes if not given."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over ranks: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where masters and optimizer state live, and where the update is made: on the accelerator, or in host memory."""


class MegatronEngineConfig(EngineOptions):
    """Megatron-core: tensor and pipeline parallelism."""

    kind: Literal["megatron"] = "megatron"
    tensor_parallel: int = 1
    """Ranks that share each matrix."""
    pipeline_parallel: int = 1
    """Pipeline stages."""
    virtual_pipeline_parallel: int = 1
    """Chunks of blocks on each stage, every `pipeline_parallel`-th one of the model. Above 1: the interleaved 1F1B
    schedule, whose stages wait that much less and send that much more."""
    data_parallel: int | None = None
    """Model replicas; what the processes allow if not given."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    distributed_optimizer: bool = False
    """Shard masters and optimizer state over model replicas."""


EngineConfig = Annotated[TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig, Field(discriminator="kind")]
