"""`hcx plan`: what a recipe needs on a cluster, whether it fits, and which legal layouts would be faster.

Nothing is built or started: everything is counted from the recipe and a cluster profile, in a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.engine.footprint import AnyEngineConfig
from hcx.engine.legality import changes, violations
from hcx.errors import ConfigError, LaunchError
from hcx.launch.costs import Communication, LayoutCosts, RankMemory, StepTime, Workload
from hcx.launch.profiles import GIB, ClusterProfile
from hcx.model.shapes import parameters_by_part
from hcx.recipe.checks import check_recipe
from hcx.recipe.train import ChatSection, TrainRecipe

FLOPS_FORMULA = "3 (2 P + 2 S H D L): P multiplying parameters, S tokens per row, H heads of D, L blocks"
_MOST_GPUS = 1 << 14


@dataclass(frozen=True)
class Layout:
    """One legal way to run a recipe.

    Attributes:
        engine: the engine's settings.
        micro_batch: `train.micro_batch`.
        world_size: GPUs.
        overrides: what turns the recipe into it; empty: the recipe itself.
        memory: per pipeline stage.
        communication: of the rank that sends most, per step.
        time: estimated seconds of a step.
        fits: whether every rank's memory does.
    """

    engine: AnyEngineConfig
    micro_batch: int
    world_size: int
    overrides: tuple[str, ...]
    memory: tuple[RankMemory, ...]
    communication: Communication
    time: StepTime
    fits: bool

    @property
    def fullest(self) -> RankMemory:
        """The stage that needs most memory."""
        return max(self.memory, key=lambda memory: memory.total)


@dataclass(frozen=True)
class Plan:
    """What `hcx plan` answers.

    Attributes:
        name: of the recipe.
        profile: the cluster.
        parameters: by part of the model.
        flops_per_token: forward and backward.
        tokens_per_step: over all replicas.
        chosen: the recipe's own layout.
        switched: the same with `engine.activation_checkpointing` the other way.
        ranked: legal layouts on as many GPUs that fit, fastest first.
        total_tokens: of the whole run.
    """

    name: str
    profile: ClusterProfile
    parameters: dict[str, int]
    flops_per_token: float
    tokens_per_step: int
    chosen: Layout
    switched: Layout
    ranked: tuple[Layout, ...]
    total_tokens: int

    @property
    def utilisation(self) -> float:
        """Estimated model FLOP/s over the peak (MFU) of the chosen layout."""
        peak = self.profile.gpu.flops(self.chosen.engine.precision) * self.chosen.world_size
        return self.flops_per_token * self.tokens_per_step / (self.chosen.time.total * peak)

    @property
    def days(self) -> float:
        """Estimated time of the whole run."""
        return self.chosen.time.total * self.total_tokens / self.tokens_per_step / 86400

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "recipe": self.name,
            "profile": self.profile.model_dump(mode="json"),
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "flops_per_token": self.flops_per_token,
            "flops_formula": FLOPS_FORMULA,
            "tokens_per_step": self.tokens_per_step,
            "fits": self.chosen.fits,
            "layout": layout_json(self.chosen),
            "switched_checkpointing": layout_json(self.switched),
            "utilisation": self.utilisation,
            "days": self.days,
            "ranked": [layout_json(layout) for layout in self.ranked],
        }


def layout_json(layout: Layout) -> dict[str, Any]:
    """A layout as plain data; sizes in bytes, times in seconds."""
    return {
        "engine": layout.engine.model_dump(mode="json"),
        "micro_batch": layout.micro_batch,
        "gpus": layout.world_size,
        "overrides": list(layout.overrides),
        "fits": layout.fits,
        "memory": [
            {
                "pipeline_stage": memory.pp_rank,
                "weights": memory.held.weights,
                "gradients": memory.held.gradients,
                "masters": memory.held.masters,
                "optimizer_state": memory.held.state,
                "activations": memory.activations,
                "workspace": memory.workspace,
                "in_host_memory": memory.held.host,
                "total": memory.total,
            }
            for memory in layout.memory
        ],
        "sent_per_step": asdict(layout.communication),
        "step_seconds": {**asdict(layout.time), "total": layout.time.total},
    }


def make_plan(recipe: TrainRecipe, profile: ClusterProfile) -> Plan:
    """Counts what a recipe needs on a cluster.

    Raises:
        ConfigError: the recipe is not legal, or of a kind that plans do not count.
    """
    check_recipe(recipe)
    if recipe.adapter is not None:
        raise ConfigError("adapter: plans count runs that train all weights; leave adapter out to plan the full run")
    from hcx.model.flops import training_flops_per_token

    work = _workload(recipe, recipe.train.micro_batch)
    world = recipe.world_size
    chosen = _layout(recipe, recipe.engine, recipe.train.micro_batch, world, profile)
    engine = recipe.engine
    other = engine.model_copy(update={"activation_checkpointing": not engine.activation_checkpointing})
    ranked = sorted(_fitting(recipe, world, profile), key=lambda layout: layout.time.total)
    return Plan(
        name=recipe.name,
        profile=profile,
        parameters={str(part): count for part, count in parameters_by_part(recipe.model).items()},
        flops_per_token=training_flops_per_token(recipe.model, work.seq_len),
        tokens_per_step=work.step_tokens,
        chosen=chosen,
        switched=_layout(recipe, other, recipe.train.micro_batch, world, profile),
        ranked=tuple(ranked),
        total_tokens=work.step_tokens * recipe.train.steps,
    )


def require_fit(plan: Plan, recipe: TrainRecipe) -> None:
    """Raises LaunchError when the recipe's layout does not fit, saying what would."""
    if plan.chosen.fits:
        return
    memory, gpu = plan.chosen.fullest, plan.profile.gpu
    needs = ", ".join(
        f"{name} {size / GIB:.1f}"
        for name, size in (
            ("weights", memory.held.weights),
            ("gradients", memory.held.gradients),
            ("optimizer", memory.held.optimizer),
            *([("less in host memory", memory.held.host)] if memory.held.host else []),
            ("activations", memory.activations),
            ("workspace", memory.workspace),
        )
    )
    message = (
        f"{plan.name} does not fit {plan.chosen.world_size} x {gpu.name}: a rank of stage {memory.pp_rank} needs "
        f"{memory.total / GIB:.1f} GiB ({needs}), and {plan.profile.usable_bytes / GIB:.1f} of {gpu.memory_gib:g} GiB "
        "are free for it"
    )
    lines = [message]
    if plan.ranked:
        near = min(plan.ranked, key=lambda layout: (len(layout.overrides), layout.time.total))
        lines.append(f"what fits on {near.world_size} GPUs: {' '.join(near.overrides)}")
    larger = smallest_fit(recipe, plan.profile, plan.chosen.world_size)
    if larger is not None:
        lines.append(f"what fits with more: {larger.world_size} GPUs: {' '.join(larger.overrides)}")
    if len(lines) == 1:
        lines.append(
            f"no legal layout fits on up to {_MOST_GPUS} of them; take a smaller model, shorter rows (data.seq_len), "
            "or a profile with more memory"
        )
    raise LaunchError("\n  ".join(lines))


def smallest_fit(recipe: TrainRecipe, profile: ClusterProfile, above: int) -> Layout | None:
    """The layout on the fewest GPUs beyond `above`, by doubling; with the fewest changed settings, then the fastest."""
    world = above * 2
    while world <= _MOST_GPUS:
        fitting = _fitting(recipe, world, profile)
        if fitting:
            return min(fitting, key=lambda layout: (len(layout.overrides), layout.time.total))
        world *= 2
    return None


def _workload(recipe: TrainRecipe, micro_batch: int) -> Workload:
    """The stage of the run with the largest micro-batch, then the longest rows."""
    if isinstance(recipe.data, ChatSection):
        return Workload(recipe.data.seq_len, micro_batch, recipe.train.global_batch)
    share = micro_batch / recipe.train.micro_batch
    stages = [
        Workload(
            stage.seq_len,
            stage.seq_len * max(1, int(stage.micro_batch * share)),
            stage.seq_len * stage.global_batch,
        )
        for stage in recipe.stages
    ]
    return max(stages, key=lambda work: (work.micro_batch_tokens, work.seq_len))


def _layout(
    recipe: TrainRecipe, engine: AnyEngineConfig, micro_batch: int, world_size: int, profile: ClusterProfile
) -> Layout:
    costs = LayoutCosts(engine, recipe.model, recipe.optim, world_size, _workload(recipe, micro_batch))
    memory = tuple(costs.memories())
    sent = [costs.communication(pp_rank) for pp_rank in range(costs.pp)]
    overrides = changes(recipe.engine, engine)
    if micro_batch != recipe.train.micro_batch:
        overrides.append(f"train.micro_batch={micro_batch}")
    return Layout(
        engine=engine,
        micro_batch=micro_batch,
        world_size=world_size,
        overrides=tuple(overrides),
        memory=memory,
        communication=max(sent, key=lambda one: one.data_parallel + one.tensor_parallel + one.pipeline_parallel),
        time=costs.time(profile),
        fits=max(one.total for one in memory) <= profile.usable_bytes,
    )


def _fitting(recipe: TrainRecipe, world_size: int, profile: ClusterProfile) -> list[Layout]:
    """Every legal engine setting that fits, each with its fastest micro-batch (of equally fast ones the largest)."""
    best: dict[str, Layout] = {}
    for layout in _layouts(recipe, world_size, profile):
        key = layout.engine.model_dump_json()
        if layout.fits and (key not in best or layout.time.total < 0.999 * best[key].time.total):
            best[key] = layout
    return list(best.values())


def _layouts(recipe: TrainRecipe, world_size: int, profile: ClusterProfile) -> Iterator[Layout]:
    """Every legal layout on `world_size` GPUs whose micro-batches divide the batch."""
    chat = isinstance(recipe.data, ChatSection)
    seq_len = None if chat else recipe.data.seq_len
    for engine in _engines(recipe, world_size, profile):
        for micro_batch in _micro_batches(recipe):
            replicas = engine.data_parallel or 1
            if not chat and recipe.train.global_batch % (micro_batch * replicas):
                continue
            counts = _counts(recipe, micro_batch)
            if any(violations(engine, recipe.model, world_size, seq_len, recipe.optim.kind, count) for count in counts):
                continue
            yield _layout(recipe, engine, micro_batch, world_size, profile)


def _micro_batches(recipe: TrainRecipe) -> Sequence[int]:
    """The recipe's and its halves; the token budget of conversations stays: it must hold the longest of them."""
    own = recipe.train.micro_batch
    if isinstance(recipe.data, ChatSection) or recipe.train.stages:
        return [own]
    return sorted({max(1, own >> shift) for shift in range(own.bit_length())}, reverse=True)


def _counts(recipe: TrainRecipe, micro_batch: int) -> list[int]:
    """Micro-batches of a step over all replicas, in each stage of the run."""
    if recipe.train.stages:
        return [stage.global_batch // stage.micro_batch for stage in recipe.stages]
    return [recipe.train.global_batch // micro_batch]


def _engines(recipe: TrainRecipe, world_size: int, profile: ClusterProfile) -> Iterator[AnyEngineConfig]:
    """Engine settings to try, in the recipe's precision: every kind, with and without recomputation."""
    same = {"precision": recipe.engine.precision, "clip_grad_norm": recipe.engine.clip_grad_norm}
    model = recipe.model

    def replicas(count: int) -> int | None:
        # As the recipe writes it, so that its own layout is among them.
        return recipe.engine.data_parallel if count == recipe.data_parallel else count

    for again in (False, True):
        common: dict[str, Any] = {**same, "activation_checkpointing": again}
        plain = recipe.engine if isinstance(recipe.engine, TorchEngineConfig) else TorchEngineConfig()
        yield plain.model_copy(update={**common, "data_parallel": replicas(world_size)})
        for stage in (0, 1, 2, 3):
            zero = DeepSpeedEngineConfig(**common, data_parallel=replicas(world_size), zero_stage=stage)
            yield zero
            if stage:
                yield zero.model_copy(update={"offload_optimizer": "cpu"})
        # Tensor parallelism stays within a node.
        for tp in range(1, min(model.kv_heads, profile.gpus_per_node, world_size) + 1):
            for pp in range(1, min(model.num_layers, world_size // tp) + 1):
                if model.num_layers % pp or world_size % (tp * pp):
                    continue
                dp = world_size // (tp * pp)
                rows = 1 if isinstance(recipe.data, ChatSection) else recipe.data.seq_len
                blocks = recipe.model.num_layers // pp
                for chunks in range(1, blocks + 1 if pp > 1 else 2):
                    if blocks % chunks:
                        continue
                    yield MegatronEngineConfig(
                        **common,
                        tensor_parallel=tp,
                        pipeline_parallel=pp,
                        virtual_pipeline_parallel=chunks,
                        data_parallel=replicas(dp),
                        sequence_parallel=tp > 1 and rows % tp == 0,
                        distributed_optimizer=dp > 1 and recipe.optim.kind == "adamw",
                    )
