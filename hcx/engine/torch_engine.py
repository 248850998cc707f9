"""The readable baseline: plain torch in one process, or data parallel over several.

Unusual here: the optimizer works on one fp32 master per *canonical* tensor (q, k and v apart, although the forward
multiplies them as one matrix). So `edit_masters`, checkpoints and per-matrix optimizers need no second bookkeeping. In
fp32 the masters are views of the working weights; in bf16 they are copies, and the working weights follow each step.
Gradients live in one flat fp32 buffer, which makes the sum over replicas one collective and the zero gradient of a
dropped branch nothing special.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from hcx.data.batch import MicroBatch
from hcx.dist import Topology, process_environment
from hcx.engine.base import Engine, ModelOutput, Objective, StateReader, StateSlice, StepBatch, StepStats
from hcx.engine.common import LOSS, global_weight, plain_meta, reduce_sums, state_tensors, step_meta
from hcx.engine.config import TorchEngineConfig
from hcx.errors import CheckpointError, ConfigError, did_you_mean
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.parts.base import PlainParts
from hcx.model.transforms import EditMaster, ModelTransform, TransformContext
from hcx.model.weights import WeightsProvider, load_weights
from hcx.optim import OptimConfig, ParameterGroup, build_optimizers, impose, parameter_groups, state_keys


class TorchEngine(Engine):
    """Runs optimizer steps with plain torch.

    Args:
        engine_config: precision, checkpointing, clipping.
        model_config: the decoder.
        optim_config: optimizer, learning rate, weight decay.
        transforms: applied to the decoder after loading.
        weights: canonical tensors to start from.
        seed: unused here (weights come from `weights`); every engine takes the same arguments.
    """

    def __init__(
        self,
        *,
        engine_config: TorchEngineConfig,
        model_config: ModelConfig,
        optim_config: OptimConfig,
        transforms: Sequence[ModelTransform] = (),
        weights: WeightsProvider,
        seed: int = 0,
    ) -> None:
        rank, world_size, local_rank = process_environment()
        self.topology = Topology(rank, world_size)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
        self._config, self._optim, self._transforms = engine_config, optim_config, tuple(transforms)
        self._replicas = self.topology.dp_size
        self._steps = 0
        self._decoder = Decoder(model_config, PlainParts(torch.float32, self.device))
        load_weights(self._decoder, self._decoder.parameter_map(), weights)
        context = TransformContext(model_config, self.topology)
        for transform in self._transforms:
            transform.apply(self._decoder, context)
        self._decoder.activation_checkpointing = engine_config.activation_checkpointing
        self._collect_masters()
        self._groups = parameter_groups(
            {name: tuple(self._masters[name].shape) for name in self._trained}, optim_config
        )
        self._group_of: dict[str, ParameterGroup] = {name: group for group in self._groups for name in group.names}
        self._optimizers = build_optimizers(
            self._groups, lambda group: [self._masters[name] for name in group.names], optim_config
        )
        if engine_config.compile:
            for sublayer in self._decoder.sublayers:
                sublayer.compile(dynamic=False)

    def _collect_masters(self) -> None:
        """Masters and gradient views by canonical name; then the working precision."""
        low = self._config.precision == "bf16"
        parameters = dict(self._decoder.named_parameters())
        blocks = self._decoder.parameter_map()
        trained = {local: parameter for local, parameter in parameters.items() if parameter.requires_grad}
        self._gradient_buffer = torch.zeros(sum(p.numel() for p in trained.values()), device=self.device)
        self._masters: dict[str, nn.Parameter] = {}
        self._working: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._local_of: dict[str, str] = {}
        self._touched: set[str] = set()
        start = 0
        for local, parameter in parameters.items():
            master = parameter.detach().clone() if low else parameter.data
            if low:
                parameter.data = parameter.data.to(torch.bfloat16)
            gradient = None
            if parameter.requires_grad:
                gradient = self._gradient_buffer[start : start + parameter.numel()].view(parameter.shape)
                start += parameter.numel()
                parameter.register_post_accumulate_grad_hook(self._hook(local, gradient))
                if not low:
                    parameter.grad = gradient
            for block in blocks[local]:
                view = nn.Parameter(block.view(master), requires_grad=parameter.requires_grad)
                self._masters[block.name] = view
                self._working[block.name] = block.view(parameter.data)
                self._local_of[block.name] = local
                if gradient is not None:
                    self._gradients[block.name] = block.view(gradient)
        self._trained = [name for name in self._masters if name in self._gradients]
        self._parameters = trained

    def _hook(self, local: str, buffer: Tensor) -> Callable[[Tensor], None]:
        def accumulated(parameter: Tensor) -> None:
            self._touched.add(local)
            if parameter.grad is not None and parameter.grad is not buffer:
                # bf16: micro-batches and replicas are summed in fp32.
                buffer.add_(parameter.grad)
                parameter.grad = None

        return accumulated

    def train_step(self, batch: StepBatch, objective: Objective, lr_factor: float) -> StepStats:
        """See `Engine.train_step`."""
        weight = global_weight(batch.micro_batches, objective, None, self.device, self._replicas)
        if weight == 0:
            return StepStats(loss_sum=0.0, weight=0.0, skipped=True)
        sums = self._backward(batch, objective, weight)
        loss_sum = sums.pop(LOSS)
        norm = self._clip()
        if batch.refuses(loss_sum / weight, norm):
            return StepStats(loss_sum, weight, sums, norm, skipped=True)
        self._update(lr_factor)
        self._steps += 1
        return StepStats(loss_sum, weight, sums, norm)

    def _backward(self, batch: StepBatch, objective: Objective, weight: float) -> dict[str, float]:
        """Gradients of loss / weight, summed over micro-batches and replicas, in the buffer; the objective's sums."""
        self._decoder.train()
        self._gradient_buffer.zero_()
        self._touched.clear()
        stored = []
        for index, micro_batch in enumerate(batch.micro_batches):
            meta = step_meta(self._transforms, batch.step, index, micro_batch)
            output = self._decoder.output(self._decoder(micro_batch.tokens, meta))
            total, metrics = objective(output, micro_batch)
            stored.append({LOSS: total.detach(), **{name: value.detach() for name, value in metrics.items()}})
            if total.requires_grad:
                (total / weight).backward()
        if self._replicas > 1:
            torch.distributed.all_reduce(self._gradient_buffer)
        return reduce_sums(stored, None, self._replicas)

    def _clip(self) -> float:
        """Clips each clip group by its own norm; returns the norm over all of them."""
        members: dict[str, list[Tensor]] = {}
        for group in self._groups:
            members.setdefault(group.clip_group, []).extend(self._gradients[name] for name in group.names)
        norms = {
            name: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found))) for name, found in members.items()
        }
        total = math.hypot(*(float(norm) for norm in norms.values()))
        limit = self._config.clip_grad_norm
        if math.isfinite(total) and limit > 0:
            for name, found in members.items():
                if float(norms[name]) > limit:
                    torch._foreach_mul_(found, limit / (float(norms[name]) + 1e-6))
        return total

    @torch.no_grad()
    def _update(self, factor: float) -> None:
        skip = self._config.missing_gradients == "skip"
        for name in self._trained:
            missing = skip and self._local_of[name] not in self._touched
            self._masters[name].grad = None if missing else self._gradients[name]
        for optimizer in self._optimizers:
            impose(optimizer, self._optim, factor)
            optimizer.step()
        self._refresh(self._trained)

    def _refresh(self, names: Iterable[str]) -> None:
        """Working weights from masters."""
        if self._config.precision == "bf16":
            chosen = list(names)
            torch._foreach_copy_([self._working[n] for n in chosen], [self._masters[n].data for n in chosen])

    @torch.no_grad()
    def score(
        self, micro_batches: Sequence[MicroBatch], fn: Callable[[ModelOutput, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """See `Engine.score`."""
        self._decoder.eval()
        results = []
        for micro_batch in micro_batches:
            hidden = self._decoder(micro_batch.tokens, plain_meta(micro_batch))
            results.append(fn(self._decoder.output(hidden), micro_batch))
        self._decoder.train()
        return results

    def gradients(self, batch: StepBatch, objective: Objective, visit: Callable[[str, Tensor], None]) -> float:
        """See `Engine.gradients`."""
        with torch.random.fork_rng():
            weight = global_weight(batch.micro_batches, objective, None, self.device, self._replicas)
            sums = self._backward(batch, objective, weight or 1.0)
        for name, master in self._masters.items():
            found = self._gradients.get(name)
            visit(name, torch.zeros_like(master.data) if found is None else found.detach().clone())
        self._gradient_buffer.zero_()
        return sums[LOSS] / weight if weight else math.nan

    def _state(self, name: str) -> dict[str, Tensor]:
        """Optimizer state of a parameter; zeros before the first step."""
        group = self._group_of.get(name)
        if group is None:
            return {}
        held: Mapping[str, Any] = {}
        for optimizer in self._optimizers:
            held = optimizer.state.get(self._masters[name], held)
        return {
            key: held[key].data if held.get(key) is not None else torch.zeros_like(self._masters[name].data)
            for key in state_keys(group, self._optim)
        }

    @torch.no_grad()
    def edit_masters(self, names: Iterable[str], fn: EditMaster) -> None:
        """See `Engine.edit_masters`."""
        for name in names:
            if name not in self._masters:
                raise ConfigError(f"no parameter is named {name!r}; {did_you_mean(name, self._masters)}")
            master = self._masters[name].data
            edited = fn(name, master.clone(), self._state(name))
            if edited is not None:
                if edited.shape != master.shape:
                    raise ValueError(f"{name}: edited to shape {tuple(edited.shape)}, was {tuple(master.shape)}")
                master.copy_(edited)
                self._refresh([name])

    def state_slices(self) -> Iterator[StateSlice]:
        """See `Engine.state_slices`. Replicas are equal: the first one answers."""
        if self.topology.dp_rank != 0:
            return
        for name, master in self._masters.items():
            for key, tensor in {"master": master.data, **self._state(name)}.items():
                shape = tuple(tensor.shape)
                yield StateSlice(name, key, shape, (0,) * len(shape), shape, tensor)

    @torch.no_grad()
    def load_slices(self, reader: StateReader) -> None:
        """See `Engine.load_slices`. State that the checkpoint lacks starts at zero."""
        stored = set(reader.names())
        if stored != set(self._masters):
            missing, extra = sorted(set(self._masters) - stored), sorted(stored - set(self._masters))
            raise CheckpointError(
                f"the checkpoint does not hold this model: it lacks {missing[:3] or 'nothing'} "
                f"({len(missing)} parameters) and has {extra[:3] or 'nothing'} ({len(extra)} parameters) too many"
            )
        for name, master in self._masters.items():
            self._read_into(master.data, reader, name, "master")
            available = set(reader.keys(name))
            group = self._group_of.get(name)
            for key in state_keys(group, self._optim) if group is not None else ():
                state = self._optimizer_of(name).state[master]
                state[key] = torch.zeros_like(master.data)
                if key in available:
                    self._read_into(state[key], reader, name, key)
                if key == "exp_avg":
                    state.setdefault("step", torch.tensor(0.0, device=self.device))
        self._refresh(self._masters)

    def _read_into(self, target: Tensor, reader: StateReader, name: str, key: str) -> None:
        full = reader.read(name, key)
        if full.shape != target.shape:
            raise CheckpointError(
                f"{name}: the checkpoint has shape {tuple(full.shape)}, the model {tuple(target.shape)}"
            )
        target.copy_(full)

    def _optimizer_of(self, name: str) -> torch.optim.Optimizer:
        group = self._group_of[name]
        return next(o for o in self._optimizers if any(g["hcx_group"] is group for g in o.param_groups))

    @torch.no_grad()
    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.export_state`."""
        for name, master in self._masters.items():
            yield name, master.data.detach().cpu().clone()

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """See `Engine.held_tensors`; the optimizer's state comes to be in the first step."""
        return {
            "weights": list(self._decoder.parameters()),
            "gradients": [self._gradient_buffer],
            "optimizer": [*self._masters.values(), *state_tensors(self._optimizers)],
        }

    def set_rope_theta(self, theta: float) -> None:
        """See `Engine.set_rope_theta`."""
        self._decoder.set_rope_theta(theta)

    def scalars(self) -> dict[str, Any]:
        """The number of optimizer steps made."""
        return {"optimizer_steps": self._steps}

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """See `Engine.load_scalars`; Adam's bias correction needs the number of steps."""
        self._steps = int(values.get("optimizer_steps", 0))
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(float(self._steps))
