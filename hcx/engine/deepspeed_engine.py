"""ZeRO 0 to 3 by DeepSpeed.

What is unusual here (measured; see ARCHITECTURE.md):
- The library divides gradients by the number of replicas, and would by the accumulation count: the loss given to it is
  `sum * replicas / global weight`, with `scale_wrt_gas=False`, so that nobody's division is left.
- The accumulation boundary is set by hand for each micro-batch, because a step may have any number of them.
- ZeRO-3 keeps a parameter's gradient of the previous step when this step gives it none (DropBP): its gradient buffer is
  cleared before every step.
- ZeRO-3 gathers a module's weights around that module's forward. Weights that are used elsewhere (embedding, output,
  low-rank factors) are registered with the module that uses them; the objective runs inside the wrapped forward,
  because log-probabilities need the output matrix.
- Writing a master leaves the working weight of the next forward stale: `push` writes that too.
- With the optimizer in host memory the library hands a gradient over at the accumulation boundary only to parameters
  that get one in that very micro-batch, and keeps the last step's for the others (DropBP): under stages 2 and 3 the
  boundary is never announced before the end, and what it keeps is cleared before every step.
- The update in host memory is torch's fused AdamW; the library's own would be compiled at first use.
- The library compiles a shared-memory collective at its first use on a CPU; it is told not to.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed
from deepspeed.utils import safe_get_full_grad, safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn

from hcx.data.batch import MicroBatch
from hcx.dist import Topology, process_environment
from hcx.engine.base import ModelOutput, Objective, StepBatch, StepStats
from hcx.engine.blocks import BlockMap
from hcx.engine.common import LOSS, global_weight, plain_meta, reduce_sums, state_tensors, step_meta
from hcx.engine.config import DeepSpeedEngineConfig
from hcx.engine.legality import require_legal
from hcx.engine.sharded import ShardedEngine, allocate_state, join_process_group, local_groups, set_step, trained_names
from hcx.errors import ConfigError
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.parts.base import PlainParts
from hcx.model.transforms import ModelTransform, TransformContext
from hcx.model.weights import WeightsProvider, load_weights
from hcx.optim import OptimConfig, build_optimizers, impose, parameter_groups, state_keys


class _Step(nn.Module):
    """Forward and objective in one module: ZeRO-3 gathers weights only inside the forward of the wrapped module."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        # In a list, so that it is not registered a second time.
        self.anchor = [min(trained, key=lambda parameter: parameter.numel())] if trained else []

    def forward(self, micro_batch: MicroBatch, meta: ForwardMeta, finish: Callable[..., Any]) -> Any:
        """`finish(output, micro_batch)` of the decoder's output."""
        hidden = self.decoder(micro_batch.tokens, meta)
        result = finish(self.decoder.output(hidden), micro_batch)
        if torch.is_grad_enabled() and self.anchor and not result[0].requires_grad:
            # DropBP dropped every trained branch. The library must run its backward nonetheless, or its accumulation
            # goes out of step: a gradient of zero does that.
            result = (result[0] + 0.0 * self.anchor[0].sum(), *result[1:])
        return result


class _ZeroMasters:
    """Masters and optimizer state of one rank under ZeRO 0 to 3 (`MasterAccess`).

    Stage 0: the parameter is the master. Stages 1 and 2: a flat range of some parameters (`_hp_mapping`), cut where the
    ranks' shares end. Stage 3: every parameter is cut into equal ranges, one per rank, the last one padded.

    Args:
        parameters: local parameters by name.
        optimizer: the library's optimizer.
        inner: torch's optimizer below it.
        stage, rank: of ZeRO.
        keys: keys of the optimizer state.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Any,
        inner: torch.optim.Optimizer,
        stage: int,
        rank: int,
        keys: tuple[str, ...],
    ) -> None:
        self._parameters, self._stage, self._rank, self._keys, self._inner = parameters, stage, rank, keys, inner
        if stage == 0:
            self._flats = [p for p in parameters.values() if p.requires_grad]
        elif stage == 3:
            self._flats = list(optimizer.fp32_partitioned_groups_flat)
        else:
            self._flats = list(optimizer.single_partition_of_fp32_groups)
        allocate_state(inner, self._flats, keys)
        if stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()
        # Set by the engine: whole local parameters as blocks, for writing the working copy.
        self.layout: BlockMap

    def held(self) -> list[Tensor]:
        """Masters and optimizer state of this rank."""
        return [*self._flats, *state_tensors([self._inner])]

    def set_step(self, step: int) -> None:
        """Sets the number of steps taken, which Adam's bias correction needs."""
        set_step(self._inner, self._flats, step)

    def ranges(self) -> dict[str, tuple[int, int]] | None:
        """The flat range of each local parameter whose master lies on this rank; None: all of every parameter."""
        if self._stage == 0:
            return None
        return {name: span for name in self._parameters if (span := self._range(name)) is not None}

    def _range(self, name: str) -> tuple[int, int] | None:
        parameter: Any = self._parameters[name]
        if self._stage == 3:
            share = parameter.ds_tensor.ds_numel
            start, stop = self._rank * share, min((self._rank + 1) * share, parameter.ds_numel)
            return (start, stop) if start < stop else None
        if self._stage == 0 or not parameter.requires_grad:
            return 0, parameter.numel()
        if parameter._hp_mapping is None:
            return None
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def keys(self) -> tuple[str, ...]:
        """See `MasterAccess`."""
        return self._keys

    def fragment(self, parameter: str, key: str) -> Tensor:
        """See `MasterAccess`; a view, in host memory where the optimizer is there."""
        tensor: Any = self._parameters[parameter]
        if self._stage == 3:
            start, stop = self._range(parameter) or (0, 0)
            held = tensor.ds_tensor
            if tensor.requires_grad and key == "master":
                held = safe_get_local_fp32_param(tensor)
            elif tensor.requires_grad:
                held = safe_get_local_optimizer_state(tensor, key)
            return held.detach().view(-1)[: stop - start]
        if self._stage == 0 or not tensor.requires_grad:
            return tensor.data.view(-1) if key == "master" else self._inner.state[tensor][key].view(-1)
        found: Tensor = tensor._hp_mapping.get_hp_fragment(None if key == "master" else key)
        return found.detach()

    def store(self, parameter: str, key: str, values: Tensor) -> None:
        """See `MasterAccess`: `fragment` is a view, so that nothing is left to do."""

    def push(self, name: str, master: Tensor) -> None:
        """Writes the working copy; a collective of all ranks under stage 3."""
        for parameter in self.layout.holders(name):
            tensor = self._parameters[parameter]
            if self._stage == 3:
                with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                    self._write(name, master, parameter)
            else:
                self._write(name, master, parameter)

    def _write(self, name: str, master: Tensor, parameter: str) -> None:
        self.layout.scatter(name, master, lambda chosen: self._parameters[chosen].data.view(-1), only=parameter)


class DeepSpeedEngine(ShardedEngine):
    """Runs optimizer steps with optimizer state, gradients and weights sharded over the replicas.

    Args:
        engine_config: the stage.
        model_config: the decoder.
        optim_config: optimizer, learning rate, weight decay.
        transforms: applied to the decoder after loading.
        weights: canonical tensors to start from.
        seed: unused here (weights come from `weights`); every engine takes the same arguments.
    """

    def __init__(
        self,
        *,
        engine_config: DeepSpeedEngineConfig,
        model_config: ModelConfig,
        optim_config: OptimConfig,
        transforms: Sequence[ModelTransform] = (),
        weights: WeightsProvider,
        seed: int = 0,
    ) -> None:
        rank, world_size, local_rank = process_environment()
        require_legal(engine_config, model_config, world_size)
        join_process_group(world_size)
        # The library insists on its launcher's variable, which neither SLURM nor a process alone has.
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        self.topology = Topology(rank, world_size)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank % torch.cuda.device_count())
        self._config, self._optim, self._transforms = engine_config, optim_config, tuple(transforms)
        self._stage, self._steps = engine_config.zero_stage, 0
        self._offloads = engine_config.offload_optimizer == "cpu"
        decoder = Decoder(model_config, PlainParts(torch.float32, self.device))
        load_weights(decoder, decoder.parameter_map(), weights)
        context = TransformContext(model_config, self.topology)
        for transform in self._transforms:
            transform.apply(decoder, context)
        decoder.activation_checkpointing = engine_config.activation_checkpointing
        self._build(decoder)

    def _build(self, decoder: Decoder) -> None:
        """Wraps the loaded and transformed decoder, and finds its masters."""
        self._decoder = decoder
        self._parameters = dict(decoder.named_parameters())
        blocks = decoder.parameter_map()
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        layout = BlockMap(blocks, shapes, None, None, self.device)
        self._layout = layout
        self._trained = trained_names(self._parameters, blocks, None)
        self._groups = parameter_groups({n: layout.shape(n) for n in layout.names if n in self._trained}, self._optim)
        if self._stage and len({group.clip_group for group in self._groups}) > 1:
            raise ConfigError(
                f"optim.rules name several clip groups, but ZeRO stage {self._stage} clips by one norm over all "
                "parameters; use one clip_group, engine.zero_stage = 0, or another engine"
            )
        number_of = local_groups(blocks, self._groups, self._trained)
        members: list[list[nn.Parameter]] = [[] for _ in self._groups]
        for name, number in number_of.items():
            members[number].append(self._parameters[name])
        positions = {id(group): number for number, group in enumerate(self._groups)}
        (self._inner,) = build_optimizers(self._groups, lambda group: members[positions[id(group)]], self._optim)
        exact = {}
        if self._config.precision == "bf16":
            exact = {n: p.detach().clone().view(-1) for n, p in self._parameters.items() if p.requires_grad}
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # The library would compile a shared-memory collective for CPU processes: gloo's does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        step = _Step(decoder)
        self._engine, *_ = deepspeed.initialize(
            model=step, optimizer=self._inner, config=self._library_config(decoder.config), dist_init_required=False
        )
        if self._stage == 3:
            _register_external(step)
        keys = state_keys(self._groups[0], self._optim) if self._groups else ()
        masters = _ZeroMasters(
            self._parameters, self._engine.optimizer, self._inner, self._stage, self.topology.rank, keys
        )
        masters.layout = layout
        self._masters = masters
        ranges = masters.ranges()
        group = None if ranges is None else torch.distributed.group.WORLD
        self._blocks = BlockMap(blocks, shapes, ranges, group, self.device)
        self._answers_for_state = ranges is not None or self.topology.rank == 0
        for name, values in exact.items():
            span = (0, values.numel()) if ranges is None else ranges.get(name)
            if span is not None:
                masters.fragment(name, "master").copy_(values[slice(*span)])

    def _library_config(self, model: ModelConfig) -> dict[str, Any]:
        offloaded = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "steps_per_print": None,
            # Stage 0 is clipped here, by clip groups.
            "gradient_clipping": self._config.clip_grad_norm if self._stage else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self._config.precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": self._stage,
                # Vectors stay whole on every rank: gathering them would cost more than they take.
                "stage3_param_persistence_threshold": model.hidden_size,
                **({"offload_optimizer": offloaded} if self._offloads else {}),
            },
        }

    def train_step(self, batch: StepBatch, objective: Objective, lr_factor: float) -> StepStats:
        """See `Engine.train_step`."""
        weight = self._global_weight(batch.micro_batches, objective)
        if weight == 0:
            return StepStats(loss_sum=0.0, weight=0.0, skipped=True)
        impose(self._inner, self._optim, lr_factor)
        sums = self._backward(batch, objective, weight)
        loss_sum = sums.pop(LOSS)
        norm = self._clip() if self._stage == 0 else self._sharded_norm()
        skipped = batch.refuses(loss_sum / weight, norm)
        if skipped:
            self._forget_gradients()
        else:
            self._engine.step()
        self._steps += not skipped
        return StepStats(loss_sum, weight, sums, norm, skipped)

    def _sharded_norm(self) -> float:
        """Stages 1 to 3: the global norm, which the library computes once more when it clips; NaN if not finite."""
        optimizer = self._engine.optimizer
        if self._stage < 3:
            norms = [float(optimizer.scaled_global_norm())]
        else:
            norms = [float(norm) for norm in optimizer._get_norm_groups()]
        # The library marks what is not finite as -1, or as infinite.
        return math.hypot(*norms) if all(0 <= norm < math.inf for norm in norms) else math.nan

    def _global_weight(self, micro_batches: Sequence[MicroBatch], objective: Objective) -> float:
        return global_weight(micro_batches, objective, None, self.device, self.topology.dp_size)

    def _backward(self, batch: StepBatch, objective: Objective, weight: float) -> dict[str, float]:
        """Forward and backward of every micro-batch; the reduced gradients of loss / weight remain in the library."""
        self._engine.train()
        self._clear_kept_gradients()
        stored = []
        hands_over_late = self._offloads and self._stage >= 2
        last = math.inf if hands_over_late else len(batch.micro_batches) - 1
        for index, micro_batch in enumerate(batch.micro_batches):
            meta = step_meta(self._transforms, batch.step, index, micro_batch)
            self._engine.set_gradient_accumulation_boundary(index == last)
            total, metrics = self._engine(micro_batch, meta, objective)
            stored.append({LOSS: total.detach(), **{name: value.detach() for name, value in metrics.items()}})
            self._engine.backward(total * (self.topology.dp_size / weight), scale_wrt_gas=False)
        if hands_over_late:
            self._engine.set_gradient_accumulation_boundary(True)
            optimizer = self._engine.optimizer
            if self._stage == 3:
                optimizer._finalize_offload_gradient_accumulation()
            else:
                optimizer._finalize_cpu_offload_gradient_accumulation()
        return reduce_sums(stored, None, self.topology.dp_size)

    def _clear_kept_gradients(self) -> None:
        """Zeroes buffers from which the library would take the last step's gradient where this step gives none."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()
        if self._offloads:
            flats = (
                optimizer.fp32_partitioned_groups_flat
                if self._stage == 3
                else optimizer.single_partition_of_fp32_groups
            )
            for kept in [*(flat.grad for flat in flats), *getattr(optimizer, "accumulated_grads_in_cpu", {}).values()]:
                kept.zero_()

    def _clip(self) -> float:
        """Stage 0: clips each clip group by its own norm; returns the norm over all of them."""
        members: dict[str, list[Tensor]] = {}
        for param_group in self._inner.param_groups:
            found = members.setdefault(param_group["hcx_group"].clip_group, [])
            found.extend(parameter.grad for parameter in param_group["params"])
        norms = {
            name: float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found))))
            for name, found in members.items()
        }
        limit = self._config.clip_grad_norm
        for name, found in members.items():
            if limit > 0 and math.isfinite(norms[name]) and norms[name] > limit:
                torch._foreach_mul_(found, limit / (norms[name] + 1e-6))
        return math.hypot(*norms.values())

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """See `Engine.held_tensors`; gradients only where the library keeps a buffer for them."""
        parameters: list[Any] = list(self._parameters.values())
        partitions = [parameter.ds_tensor for parameter in parameters] if self._stage == 3 else []
        buffer = [self._engine.optimizer.grad_partitions_flat_buffer] if self._stage == 3 else []
        if self._stage == 3 and self._offloads:
            buffer += [flat.grad for flat in self._engine.optimizer.fp32_partitioned_groups_flat]
        return {"weights": [*parameters, *partitions], "gradients": buffer, "optimizer": self._masters.held()}

    def set_rope_theta(self, theta: float) -> None:
        """See `Engine.set_rope_theta`."""
        self._decoder.set_rope_theta(theta)

    @torch.no_grad()
    def score(
        self, micro_batches: Sequence[MicroBatch], fn: Callable[[ModelOutput, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """See `Engine.score`."""
        self._engine.eval()
        results = [self._engine(micro_batch, plain_meta(micro_batch), fn).detach() for micro_batch in micro_batches]
        self._engine.train()
        return results

    def gradients(self, batch: StepBatch, objective: Objective, visit: Callable[[str, Tensor], None]) -> float:
        """See `Engine.gradients`."""
        with torch.random.fork_rng():
            weight = self._global_weight(batch.micro_batches, objective)
            sums = self._backward(batch, objective, weight or 1.0)
        whole: dict[str, Tensor] = {}
        for name in self._layout.names:
            (local,) = self._layout.holders(name)
            if local not in whole:
                # A fused matrix is gathered once, for its several names, which follow one another.
                whole = {local: self._whole_gradient(local)}
            visit(name, self._layout.gather(name, whole.__getitem__))
        self._forget_gradients()
        return sums[LOSS] / weight if weight else math.nan

    def _whole_gradient(self, local: str) -> Tensor:
        parameter: Any = self._parameters[local]
        if not parameter.requires_grad:
            return torch.zeros(getattr(parameter, "ds_numel", parameter.numel()), device=self.device)
        return safe_get_full_grad(parameter).detach().float().reshape(-1)

    def _forget_gradients(self) -> None:
        """Drops what a backward without a step left, as the library does when it skips a step."""
        optimizer = self._engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self._stage in (1, 2):
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
            optimizer.micro_step_id = -1
        elif self._stage == 3:
            optimizer._pre_step()
            optimizer._partition_all_parameters()
            optimizer.averaged_gradients = {}
            optimizer.grad_partitions_flat_buffer.zero_()
        if self._offloads:
            # Gradient norms are kept until a step; the next would clip by those of weights that give none there.
            optimizer.reset_cpu_buffers()

    def close(self) -> None:
        """Removes the library's hooks and buffers."""
        self._engine.destroy()


def _register_external(step: _Step) -> None:
    """Names the weights that are used outside the forward of the module that holds them, to the module that does."""
    embedding = [step.decoder.embedding.weight] if step.decoder.embedding is not None else []
    for weight in dict.fromkeys([step.decoder.output_weight(), *embedding, *step.anchor]):
        deepspeed.zero.register_external_parameter(step, weight)
    for module in step.modules():
        for child in module.children():
            if isinstance(child, nn.ParameterDict):
                for weight in child.values():
                    deepspeed.zero.register_external_parameter(module, weight)
