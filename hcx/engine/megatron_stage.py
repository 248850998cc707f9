"""A pipeline stage's chunks of the decoder as megatron-core wants them: config, groups, marks, wrapper, optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

with warnings.catch_warnings():
    # Without Transformer Engine or Apex the library announces its torch fallbacks, once per module.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule
from hcx.data.batch import MicroBatch
from hcx.dist import Topology
from hcx.engine.config import MegatronEngineConfig
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.naming import ParameterMap
from hcx.optim import OptimConfig


class StageChunk(MegatronModule):
    """One chunk of a pipeline stage, as megatron-core's schedules and wrappers want to see it.

    Args:
        config: what the library reads.
        stage: the chunk's blocks, and what else of the decoder it holds.
        tied: its copy of an embedding that another stage shares.
        number: which of the stage's chunks it is.
    """

    def __init__(
        self, config: TransformerConfig, stage: Decoder, tied: nn.Parameter | None = None, number: int = 0
    ) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = None if config.virtual_pipeline_model_parallel_size is None else number
        self.pre_process = stage.embedding is not None
        self.post_process = stage.norm is not None
        self.share_embeddings_and_output_weights = tied is not None
        # In a list, so that it is not registered a second time.
        self._tied = [tied]
        self._received: Tensor | None = None
        # Not named `decoder`: the schedules would look for `.decoder.layers`.
        self.stage = stage

    def shared_embedding_or_output_weight(self) -> nn.Parameter | None:
        """The copy of the tied embedding on this stage."""
        return self._tied[0]

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Takes the hidden states `[seq, batch, hidden]` that the chunk before it sent."""
        self._received = tensors[0]

    def forward(self, micro_batch: MicroBatch, meta: ForwardMeta) -> Tensor:
        """Hidden states of this chunk `[seq, batch, hidden]`."""
        hidden, self._received = self._received, None
        return self.stage(micro_batch.tokens if self.pre_process else hidden, meta)


_acquired: tuple[Any, int, int, int] | None = None
"""(default process group, tp, pp, chunks of a stage) that the library's groups were made for."""


def acquire_groups(topology: Topology, chunks: int = 1) -> None:
    """The library's process groups, which are global: made again only for another layout."""
    global _acquired
    # Modules that the library imports later announce the same torch fallbacks.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
    wanted = (torch.distributed.group.WORLD, topology.tp_size, topology.pp_size, chunks)
    if _acquired == wanted and parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        create_gloo_process_groups=False,
    )
    _acquired = wanted


def library_config(engine: MegatronEngineConfig, model: ModelConfig) -> TransformerConfig:
    """What the schedules, the wrapper and the optimizer read; the decoder has its own configuration."""
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    chunks = engine.virtual_pipeline_parallel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defaults of features that are not used
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_heads,
            num_query_groups=model.kv_heads,
            ffn_hidden_size=model.intermediate_size,
            tensor_model_parallel_size=engine.tensor_parallel,
            pipeline_model_parallel_size=engine.pipeline_parallel,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            # Interleaved stages send and receive while they compute. With batched messages, the library's default, they
            # take another chunk's tensors over gloo, without an error.
            batch_p2p_comm=chunks == 1,
            overlap_p2p_comm=chunks > 1,
            sequence_parallel=engine.sequence_parallel,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=engine.precision == "bf16",
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            # The loss is final when it arrives: replicas are summed, and nothing divides.
            calculate_per_token_loss=True,
        )


def mark_sharded(parameters: Mapping[str, nn.Parameter], blocks: ParameterMap) -> None:
    """Tells the library which parameters are parts and which are replicas over tensor-parallel ranks."""
    for name, parameter in parameters.items():
        first = blocks[name][0]
        local = (first.rows[1] - first.rows[0], *parameter.shape[1:])
        split = [dim for dim, size in enumerate(first.global_shape) if local[dim] != size]
        set_tensor_model_parallel_attributes(parameter, bool(split), split[0] if split else -1, 1)


def mark_tied(stage: Decoder, place: Topology) -> nn.Parameter | None:
    """This chunk's copy of an embedding that another stage shares and that is trained, marked for the library."""
    tied = stage.shared_embedding_or_output_weight()
    if tied is None or place.pp_size == 1 or not tied.requires_grad:
        return None
    tied.shared_embedding = True  # type: ignore[attr-defined]
    if not place.is_first_stage:
        # Norms count the first stage's copy only.
        tied.shared = True  # type: ignore[attr-defined]
    return tied


def wrap(chunk: StageChunk, engine: MegatronEngineConfig) -> DistributedDataParallel:
    """The chunk with its gradient buffers."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        # Buckets that wait for every gradient and DropBP's missing ones do not go together.
        overlap_grad_reduce=False,
        use_distributed_optimizer=engine.distributed_optimizer,
    )
    return DistributedDataParallel(chunk.config, settings, chunk)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    parameters: Mapping[str, nn.Parameter],
    members: Mapping[str, int],
    count: int,
    optim: OptimConfig,
    engine: MegatronEngineConfig,
) -> tuple[Any, Any]:
    """The library's optimizer, with one group of its per group of ours; and the one member of its chain.

    Args:
        chunks: what the stage holds, wrapped.
        parameters: their local parameters.
        members: local name -> number of its group, which the library's groups then carry as `hcx_group`.
        count: number of groups, over all stages.
        optim, engine: settings.
    """
    for name, index in members.items():
        parameters[name].hcx_group = index  # type: ignore[attr-defined]

    def member_of(index: int) -> Callable[[nn.Parameter], bool]:
        return lambda parameter: getattr(parameter, "hcx_group", None) == index

    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="sgd" if optim.kind == "sgd" else "adam",
            lr=optim.lr,
            min_lr=0.0,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            sgd_momentum=optim.momentum,
            clip_grad=0.0,
            bf16=engine.precision == "bf16",
            params_dtype=chunks[0].config.params_dtype,
            use_distributed_optimizer=engine.distributed_optimizer,
        ),
        list(chunks),
        config_overrides={
            ParamKey(predicate=ParamPredicate(f"hcx_group_{index}", member_of(index))): {"hcx_group": index}
            for index in range(count)
        },
        use_gloo_process_groups=False,
    )
    return optimizer, optimizer.chained_optimizers[0]
