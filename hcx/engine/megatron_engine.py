"""Tensor and pipeline parallelism by megatron-core: its layers, schedules, data-parallel wrapper and optimizers.

What is unusual here (measured; see ARCHITECTURE.md):
- The loss that reaches the schedule is final: `sum / global weight`, with zero token counts, because the library's own
  per-token divisor is an integer tensor and its other mode divides by the number of micro-batches.
- Gradients are read from `main_grad`; `grad` is empty after a backward.
- The optimizer applies neither weight decay multipliers nor learning rates by itself: both are imposed every step.
- The two copies of tied embeddings on the first and last stage are loaded from one canonical tensor, their gradients
  are summed by `finalize_model_grads`, and the last stage's copy is marked so that norms count it once.
- A stage holds one chunk of the decoder, or several that the interleaved schedule runs in turn; that schedule takes
  whole groups of micro-batches, so that scores and probes are filled up by copies that count for nothing.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # Without Transformer Engine or Apex the library announces its torch fallbacks, once per module.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared
from hcx.data.batch import MicroBatch
from hcx.dist import Topology, process_environment, rehearsal
from hcx.engine.base import ModelOutput, Objective, StepBatch, StepStats
from hcx.engine.blocks import BlockMap
from hcx.engine.common import LOSS, global_weight, plain_meta, reduce_sums, step_meta
from hcx.engine.config import MegatronEngineConfig
from hcx.engine.legality import require_legal
from hcx.engine.megatron_masters import MegatronMasters
from hcx.engine.megatron_stage import (
    StageChunk,
    acquire_groups,
    build_optimizer,
    library_config,
    mark_sharded,
    mark_tied,
    wrap,
)
from hcx.engine.sharded import ShardedEngine, join_process_group, local_groups, trained_names
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.naming import ParameterMap
from hcx.model.parts.megatron import MegatronParts
from hcx.model.shapes import stage_chunks
from hcx.model.transforms import ModelTransform, TransformContext
from hcx.model.weights import WeightsProvider, load_weights
from hcx.optim import OptimConfig, parameter_groups, state_keys


class _MicroStep(NamedTuple):
    """A micro-batch as every chunk iterates them.

    Attributes:
        micro_batch, meta: tokens and what else the forward needs.
        share: 1, or 0 for a copy that only fills up a group.
    """

    micro_batch: MicroBatch
    meta: ForwardMeta
    share: float = 1.0


class MegatronEngine(ShardedEngine):
    """Runs optimizer steps over tensor, pipeline and data parallel ranks.

    Args:
        engine_config: the layout; refused by `legality` where it does not fit.
        model_config: the decoder.
        optim_config: optimizer, learning rate, weight decay.
        transforms: applied to each of this rank's chunks after loading.
        weights: canonical tensors to start from.
        seed: of the initial weights that `weights` leaves open, and of the RNG.

    On a machine without CUDA it runs only in a process that called `hcx.dist.rehearsal.enable()`.
    """

    def __init__(
        self,
        *,
        engine_config: MegatronEngineConfig,
        model_config: ModelConfig,
        optim_config: OptimConfig,
        transforms: Sequence[ModelTransform] = (),
        weights: WeightsProvider,
        seed: int = 0,
    ) -> None:
        rank, world_size, local_rank = process_environment()
        require_legal(engine_config, model_config, world_size, optimizer=optim_config.kind)
        self.topology = Topology(
            rank,
            world_size,
            tp_size=engine_config.tensor_parallel,
            pp_size=engine_config.pipeline_parallel,
        )
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank % torch.cuda.device_count())
        self._config, self._model_config, self._optim = engine_config, model_config, optim_config
        self._transforms, self._steps = tuple(transforms), 0
        with rehearsal.redirected():
            join_process_group(world_size)
            acquire_groups(self.topology, engine_config.virtual_pipeline_parallel)
            self._build(weights)

    def _build(self, weights: WeightsProvider) -> None:
        """Structure of this stage -> load -> transforms -> wrap -> optimizer."""
        place, model = self.topology, self._model_config
        self._library = library_config(self._config, model)
        self._decoders = self._build_decoders(weights)
        self._parameters = dict(nn.ModuleList(self._decoders).named_parameters())
        blocks: ParameterMap = {
            f"{number}.{name}": found
            for number, decoder in enumerate(self._decoders)
            for name, found in decoder.parameter_map().items()
        }
        mark_sharded(self._parameters, blocks)
        tied = [mark_tied(decoder, place) for decoder in self._decoders]
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self._layout = BlockMap(blocks, shapes, None, parallel_state.get_model_parallel_group(), self.device)
        self._trained = trained_names(self._parameters, blocks, parallel_state.get_model_parallel_group())
        self._groups = parameter_groups(
            {name: self._layout.shape(name) for name in self._layout.names if name in self._trained}, self._optim
        )
        exact = self._lower_precision()
        self._chunks = [
            wrap(StageChunk(self._library, decoder, copy, number), self._config)
            for number, (decoder, copy) in enumerate(zip(self._decoders, tied, strict=True))
        ]
        self._library.finalize_model_grads_func = self._finalize
        members = local_groups(blocks, self._groups, self._trained)
        self._optimizer, self._inner = build_optimizer(
            self._chunks, self._parameters, members, len(self._groups), self._optim, self._config
        )
        keys = state_keys(self._groups[0], self._optim) if self._groups else ()
        self._masters = MegatronMasters(self._parameters, self._inner, self._layout, keys)
        ranges = self._masters.ranges()
        self._blocks = self._layout
        if ranges is not None:
            world = torch.distributed.group.WORLD
            self._blocks = BlockMap(blocks, shapes, ranges, world, self.device)
        self._answers_for_state = ranges is not None or place.dp_rank == 0
        for name, values in exact.items():
            span = (0, values.numel()) if ranges is None else ranges.get(name)
            if span is not None and self._parameters[name].requires_grad:
                self._masters.fragment(name, "master").copy_(values.view(-1)[slice(*span)])

    def _build_decoders(self, weights: WeightsProvider) -> list[Decoder]:
        """This stage's chunks of the decoder, loaded and transformed."""
        place, model, chunks = self.topology, self._model_config, self._config.virtual_pipeline_parallel
        parts = MegatronParts(self._config.sequence_parallel, torch.float32, self.device)
        context = TransformContext(model, place, chunks)
        decoders = []
        for stage in stage_chunks(model, place.pp_rank, place.pp_size, chunks):
            decoder = Decoder(model, parts, layers=stage.layers, pre=stage.pre, post=stage.post)
            load_weights(decoder, decoder.parameter_map(), weights)
            for transform in self._transforms:
                transform.apply(decoder, context)
            decoder.activation_checkpointing = self._config.activation_checkpointing
            decoders.append(decoder)
        return decoders

    def _lower_precision(self) -> dict[str, Tensor]:
        """Working weights in the working precision; the fp32 values that the masters shall start from."""
        if self._config.precision == "fp32":
            return {}
        exact = {name: parameter.data for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(torch.bfloat16)
        return exact

    def _impose_groups(self, lr_factor: float) -> None:
        """Learning rate and weight decay of every group, for the coming step."""
        for group in self._inner.param_groups:
            known = self._groups[group["hcx_group"]]
            group["lr"] = self._optim.lr * known.lr_mult * lr_factor
            group["weight_decay"] = known.weight_decay

    def train_step(self, batch: StepBatch, objective: Objective, lr_factor: float) -> StepStats:
        """See `Engine.train_step`."""
        with rehearsal.redirected():
            self._require_whole_groups(len(batch.micro_batches))
            weight = self._global_weight(batch.micro_batches, objective)
            if weight == 0:
                return StepStats(loss_sum=0.0, weight=0.0, skipped=True)
            self._impose_groups(lr_factor)
            loss_sum, metrics = self._backward(batch, objective, weight, force_all_reduce=False)
            self._optimizer.prepare_grads()
            norm = self._clip()
            skipped = batch.refuses(loss_sum / weight, norm)
            if not skipped:
                self._optimizer.step_with_ready_grads()
                self._steps += 1
            self._clear_gradients()
            return StepStats(loss_sum, weight, metrics, norm, skipped)

    def _require_whole_groups(self, micro_batches: int) -> None:
        """A training step is not filled up: every step would compute copies for nothing."""
        if len(self._chunks) > 1 and micro_batches % self.topology.pp_size:
            place = self.topology
            require_legal(
                self._config, self._model_config, place.world_size, micro_batches=micro_batches * place.dp_size
            )

    def _global_weight(self, micro_batches: Sequence[MicroBatch], objective: Objective) -> float:
        group = parallel_state.get_data_parallel_group()
        return global_weight(micro_batches, objective, group, self.device, self.topology.dp_size)

    def _backward(
        self, batch: StepBatch, objective: Objective, weight: float, force_all_reduce: bool
    ) -> tuple[float, dict[str, float]]:
        """Forward and backward of every micro-batch; gradients of loss / weight are in `main_grad` afterwards."""
        for chunk in self._chunks:
            chunk.train()
        self._clear_gradients()

        def loss(hidden: Tensor, step: _MicroStep) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, metrics = objective(self._decoders[-1].output(hidden), step.micro_batch)
            sums = {name: value.detach() for name, value in metrics.items()}
            # The schedule works on the loss in place: it gets a fresh tensor, and no tokens to divide by.
            no_tokens = torch.tensor(0, dtype=torch.int, device=self.device)
            return total * step.share / weight, no_tokens, {LOSS: total.detach().clone(), **sums}

        steps = [
            _MicroStep(micro_batch, step_meta(self._transforms, batch.step, index, micro_batch))
            for index, micro_batch in enumerate(batch.micro_batches)
        ]
        stored = self._schedule(steps, loss, forward_only=False, force_all_reduce=force_all_reduce)
        return self._reduce_sums(stored)

    def _schedule(
        self,
        micro_steps: Sequence[_MicroStep],
        finish: Callable[..., Any],
        *,
        forward_only: bool,
        force_all_reduce: bool = False,
    ) -> list[Any]:
        """Runs the library's schedule; `finish(hidden, step)` on the last chunk, whose results it returns.

        Every chunk iterates the same micro-batches: positions, document bounds and the DropBP mask are data there.
        """
        rows, columns = micro_steps[0].micro_batch.tokens.shape
        if columns % self.topology.tp_size:
            require_legal(self._config, self._model_config, self.topology.world_size, seq_len=columns)

        def forward_step(iterator: Iterator[_MicroStep], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            step = next(iterator)
            hidden = chunk(step.micro_batch, step.meta)
            return hidden, lambda output, non_loss_data=False: finish(output, step)

        filled = self._whole_groups(micro_steps)
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(filled) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(filled),
            seq_length=columns,
            micro_batch_size=rows,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            force_all_reduce=force_all_reduce,
        )
        return results[: len(micro_steps)]

    def _whole_groups(self, steps: Sequence[_MicroStep]) -> list[_MicroStep]:
        """Steps as the schedule takes them: interleaved, in groups of as many as there are stages."""
        missing = -len(steps) % self.topology.pp_size if len(self._chunks) > 1 else 0
        return [*steps, *(steps[-1]._replace(share=0.0) for _ in range(missing))]

    def _finalize(self, chunks: list[nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
        """Reduces gradients over replicas, tied copies and norms; nothing divides them."""
        replicated: list[Any] = [p for p in self._parameters.values() if getattr(p, "tp_partial_gradient", False)]
        partial = [p.main_grad for p in replicated if p.requires_grad]
        if partial and self.topology.tp_size > 1:
            flat = torch._utils._flatten_dense_tensors(partial)
            torch.distributed.all_reduce(flat, group=parallel_state.get_tensor_model_parallel_group())
            for gradient, summed in zip(partial, torch._utils._unflatten_dense_tensors(flat, partial), strict=True):
                gradient.copy_(summed)
        finalize_model_grads(chunks, None, **options)

    def _reduce_sums(self, stored: Sequence[Mapping[str, Tensor]]) -> tuple[float, dict[str, float]]:
        """(loss sum, metrics) over micro-batches and replicas, on every stage."""
        sums: dict[str, float] = {}
        if self.topology.is_last_stage:
            sums = reduce_sums(stored, parallel_state.get_data_parallel_group(), self.topology.dp_size)
        if self.topology.pp_size > 1:
            box = [sums]
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast_object_list(
                box, src=last, group=parallel_state.get_pipeline_model_parallel_group()
            )
            sums = box[0]
        return sums.pop(LOSS), sums

    def _clip(self) -> float:
        """Clips each clip group by its own global norm; returns the norm over all of them."""
        members: dict[str, list[nn.Parameter]] = {group.clip_group: [] for group in self._groups}
        for group in self._inner.param_groups:
            members[self._groups[group["hcx_group"]].clip_group] += group["params"]
        tp_group = parallel_state.get_tensor_model_parallel_group()
        norms = []
        for parameters in members.values():
            # Copies (tied embeddings, weights replicated over tensor parallel ranks) count once.
            counted = [
                parameter.grad
                for parameter in parameters
                if parameter.grad is not None
                and param_is_not_shared(parameter)
                and param_is_not_tensor_parallel_duplicate(parameter, tp_group)
            ]
            norms.append(
                get_grad_norm_fp32(counted, grad_stats_parallel_group=self._inner.get_grad_stats_parallel_group())
            )
        total = math.hypot(*norms)
        if math.isfinite(total) and self._config.clip_grad_norm > 0:
            for parameters, norm in zip(members.values(), norms, strict=True):
                clip_grad_by_total_norm_fp32(parameters, self._config.clip_grad_norm, norm)
        return total

    def _clear_gradients(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """See `Engine.held_tensors`."""
        parameters: list[Any] = list(self._parameters.values())
        return {
            "weights": parameters,
            "gradients": [parameter.main_grad for parameter in parameters if parameter.requires_grad],
            "optimizer": self._masters.held(),
        }

    def set_rope_theta(self, theta: float) -> None:
        """See `Engine.set_rope_theta`."""
        for decoder in self._decoders:
            decoder.set_rope_theta(theta)

    def score(
        self, micro_batches: Sequence[MicroBatch], fn: Callable[[ModelOutput, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """See `Engine.score`."""
        results: list[Tensor] = []
        with rehearsal.redirected(), torch.no_grad():
            for chunk in self._chunks:
                chunk.eval()
            # The schedules send one shape: rows of equal shape go together.
            for _, same in itertools.groupby(micro_batches, key=lambda micro_batch: micro_batch.tokens.shape):
                steps = [_MicroStep(micro_batch, plain_meta(micro_batch)) for micro_batch in same]
                found = self._schedule(
                    steps,
                    lambda hidden, step: fn(self._decoders[-1].output(hidden), step.micro_batch),
                    forward_only=True,
                )
                results += self._from_last_stage(found)
            for chunk in self._chunks:
                chunk.train()
        return results

    def _from_last_stage(self, tensors: list[Tensor]) -> list[Tensor]:
        """The last stage's tensors, on every stage."""
        if self.topology.pp_size == 1:
            return [tensor.detach() for tensor in tensors]
        group = parallel_state.get_pipeline_model_parallel_group()
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        forms = [[(tuple(tensor.shape), tensor.dtype) for tensor in tensors]]
        torch.distributed.broadcast_object_list(forms, src=last, group=group)
        if not self.topology.is_last_stage:
            tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in forms[0]]
        for tensor in tensors:
            torch.distributed.broadcast(
                tensor.detach().contiguous() if self.topology.is_last_stage else tensor, src=last, group=group
            )
        return [tensor.detach() for tensor in tensors]

    def gradients(self, batch: StepBatch, objective: Objective, visit: Callable[[str, Tensor], None]) -> float:
        """See `Engine.gradients`."""
        with rehearsal.redirected(), torch.random.fork_rng(enabled=True):
            weight = self._global_weight(batch.micro_batches, objective)
            # With a distributed optimizer too, every replica shall hold whole gradients here.
            loss_sum, _ = self._backward(batch, objective, weight or 1.0, force_all_reduce=True)
            for name in self._layout.names:
                visit(name, self._layout.gather(name, self._gradient))
            self._clear_gradients()
        return loss_sum / weight if weight else math.nan

    def _gradient(self, parameter: str) -> Tensor:
        tensor: Any = self._parameters[parameter]
        return tensor.main_grad.view(-1) if tensor.requires_grad else torch.zeros_like(tensor).view(-1)
