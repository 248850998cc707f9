"""The libraries' own minimal training loops, which `hcx bench train --engine` times beside the engines.

What a user writes who takes the library as it comes: DeepSpeed around a module (transformers' model of the same shape,
or this repository's decoder), and megatron-core's `GPTModel` under its own schedule, wrapper and optimizer. AdamW,
clipping and precision as the engine has them; no packing, no policies, no metrics.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcx.data.batch import MicroBatch
from hcx.dist import rehearsal
from hcx.engine.config import MegatronEngineConfig
from hcx.model.config import ModelConfig
from hcx.model.convert.peer import transformers_model
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.parts.base import PlainParts
from hcx.model.weights import InitWeights, load_weights

Loop = Callable[[Sequence[MicroBatch]], Tensor | None]
"""One optimizer step over a rank's micro-batches; the loss of the last one, where this rank has it."""

LEARNING_RATE = 1e-4
CLIP = 1.0


class _OwnDecoder(nn.Module):
    """This repository's decoder and loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config, PlainParts(torch.float32))
        load_weights(self.decoder, self.decoder.parameter_map(), InitWeights(config, 0))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.decoder(tokens, ForwardMeta())
        return -self.decoder.output(hidden).token_logprobs(labels).mean()


class _Transformers(nn.Module):
    """transformers' model of the same shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = transformers_model(config).train()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def deepspeed_loop(config: ModelConfig, stage: int, micro_batches: int, own_decoder: bool) -> tuple[Loop, Any]:
    """A minimal DeepSpeed loop in fp32, and the library's engine, to be destroyed after use.

    Args:
        config: the shape.
        stage: of ZeRO.
        micro_batches: per step and rank.
        own_decoder: around this repository's decoder; else around transformers' model. Stage 3 can gather weights only
            for modules that use their own, which the former's output does not.
    """
    import deepspeed
    import deepspeed.ops

    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles a collective that gloo has
    module = _OwnDecoder(config) if own_decoder else _Transformers(config)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": micro_batches,
            "steps_per_print": None,
            "gradient_clipping": CLIP,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": config.hidden_size},
        },
        dist_init_required=False,
    )

    def step(batches: Sequence[MicroBatch]) -> Tensor:
        for batch in batches:
            loss: Tensor = engine(batch.tokens, batch.labels)
            engine.backward(loss)
            engine.step()
        return loss.detach()

    return step, engine


class _SequenceParallelNorm(nn.RMSNorm):
    """torch's RMSNorm on a part of the sequence, which megatron-core's wrapper of it refuses; its others need CUDA."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **ignored: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        # The library then sums this weight's gradient over the tensor-parallel ranks.
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]


def megatron_loop(config: ModelConfig, layout: MegatronEngineConfig, rows: int, seq_len: int) -> Loop:
    """A minimal megatron-core loop in fp32 over `GPTModel`, on process groups that are already those of the layout.

    Args:
        config: the shape.
        layout: tensor, pipeline and data parallelism.
        rows, seq_len: of a micro-batch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel.random import initialize_rng_tracker
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

        # Nothing is drawn (no dropout): the tracker that switches no states also runs without CUDA, and costs the loop
        # nothing.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        with rehearsal.redirected():
            shape = TransformerConfig(
                num_layers=config.num_layers,
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_heads,
                num_query_groups=config.kv_heads,
                ffn_hidden_size=config.intermediate_size,
                normalization="RMSNorm",
                layernorm_epsilon=config.norm_eps,
                gated_linear_unit=True,
                activation_func=F.silu,
                add_bias_linear=False,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                bias_activation_fusion=False,
                masked_softmax_fusion=False,
                bias_dropout_fusion=False,
                apply_rope_fusion=False,
                gradient_accumulation_fusion=False,
                use_cpu_initialization=True,
                tensor_model_parallel_size=layout.tensor_parallel,
                pipeline_model_parallel_size=layout.pipeline_parallel,
                sequence_parallel=layout.sequence_parallel,
                params_dtype=torch.float32,
                pipeline_dtype=torch.float32,
            )
            layer = block = get_gpt_layer_local_spec(normalization="RMSNorm")
            if layout.sequence_parallel:
                layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _SequenceParallelNorm
                layers = config.num_layers // layout.pipeline_parallel
                block = TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=_SequenceParallelNorm)
            model = GPTModel(
                shape,
                block,
                vocab_size=config.vocab_size,
                max_sequence_length=seq_len,
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
                share_embeddings_and_output_weights=config.tie_embeddings,
                position_embedding_type="rope",
                rotary_base=int(config.rope_theta),
            )
            chunk = DistributedDataParallel(
                shape,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed_optimizer
                ),
                model,
            )
            optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=LEARNING_RATE,
                    adam_beta1=0.9,
                    adam_beta2=0.95,
                    weight_decay=0.1,
                    clip_grad=CLIP,
                    params_dtype=torch.float32,
                    use_distributed_optimizer=layout.distributed_optimizer,
                ),
                [chunk],
                use_gloo_process_groups=False,
            )
    shape.finalize_model_grads_func = finalize_model_grads
    shape.grad_scale_func = optimizer.scale_loss
    hidden_from = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool).triu_(1)
    run = get_forward_backward_func()

    def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = output.float().mean()
        return mean, {"loss": mean.detach()}

    def forward_step(iterator: Iterator[MicroBatch], part: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        return part(batch.tokens, batch.positions, hidden_from.to(batch.tokens.device), labels=batch.labels), loss

    def step(batches: Sequence[MicroBatch]) -> Tensor | None:
        with rehearsal.redirected():
            chunk.zero_grad_buffer()
            optimizer.zero_grad()
            stored = schedule(data_iterator=iter(batches), num_microbatches=len(batches))
            optimizer.step()
        return stored[-1]["loss"] if stored else None

    schedule = partial(
        run,
        forward_step_func=forward_step,
        model=[chunk],
        seq_length=seq_len,
        micro_batch_size=rows,
        forward_only=False,
    )
    return step
