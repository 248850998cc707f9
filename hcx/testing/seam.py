"""One scenario that every engine must run alike: steps, an edit, a swapped source, a probe, scores, a checkpoint.

The same function runs in the test's process (the one-process reference) and in worker processes (any layout).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hcx.data.batch import MicroBatch
from hcx.dist import derived_generator, rehearsal
from hcx.engine.base import Engine, ModelOutput, StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.model.config import ModelConfig
from hcx.model.parts.sources import LoRASource
from hcx.model.transforms import FixedDropMask, ModelTransform, TransformContext
from hcx.model.weights import InitWeights
from hcx.optim import GroupRule, OptimConfig
from hcx.testing.tiny import tiny_config
from hcx.train import CheckpointReader, save_checkpoint

STEPS = 5
EDIT_AFTER = 2
"""Steps done when masters are edited (and, before that, the probe runs and a checkpoint may be written)."""
GLOBAL_BATCH = 4
SEQ = 16
LORA_STEMS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
"""A column-parallel stem inside a fused part, and a row-parallel one on the last stage."""
EDITED = ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight")

AnyEngineConfig = TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig


def _optim() -> OptimConfig:
    # A large eps: with 1e-8, gradients at rounding level become updates of full size.
    rules = (GroupRule(pattern="*embed_tokens*", lr_mult=0.5), GroupRule(pattern="*norm*", weight_decay=0.05))
    return OptimConfig(kind="adamw", lr=1e-2, eps=1e-3, rules=rules)


@dataclass(frozen=True)
class SeamCase:
    """What is run.

    Attributes:
        engine: kind and layout.
        model: the decoder.
        optim: the optimizer.
        lora: swap the sources of two linears for a frozen base with low-rank updates.
        lora_stems: which linears.
        freeze: train nothing but the low-rank updates.
        probe: call `gradients` and `score` on the way; they must change nothing.
    """

    engine: AnyEngineConfig
    model: ModelConfig = field(default_factory=tiny_config)
    optim: OptimConfig = field(default_factory=_optim)
    lora: bool = True
    lora_stems: tuple[str, ...] = LORA_STEMS
    freeze: bool = False
    probe: bool = True

    def on(self, engine: AnyEngineConfig, **changes: Any) -> SeamCase:
        """The same case on another engine, in the same precision and with the same clipping."""
        same = {"clip_grad_norm": self.engine.clip_grad_norm, "precision": self.engine.precision}
        return dataclasses.replace(self, engine=engine.model_copy(update=same), **changes)


@dataclass
class SeamResult:
    """What one rank saw.

    Attributes:
        losses, norms, metrics: of each step.
        scores: of this replica's rows.
        gradients: canonical name -> full gradient at the probe.
        probe_loss: mean loss that the probe returned.
        edits: what the edit saw: name -> (master, optimizer state).
        weights: canonical name -> full tensor at the end.
        dp_rank, dp_size: which replica this rank belongs to, of how many.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    probe_loss: float | None = None
    edits: dict[str, tuple[Tensor, dict[str, Tensor]]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    dp_rank: int = 0
    dp_size: int = 1


class SeamWeights(InitWeights):
    """Random weights whose norms differ from 1."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `WeightsProvider.tensor`."""
        full = super().tensor(name, shape)
        if len(shape) == 1:
            full = full + 0.3 * torch.randn(shape, generator=derived_generator(self._seed, "norm", name))
        return full


class SwapSources(ModelTransform):
    """Replaces the sources of some linears by LoRA over the frozen base; may freeze all else."""

    def __init__(self, stems: tuple[str, ...], freeze: bool) -> None:
        self._stems, self._freeze = stems, freeze

    def apply(self, chunk: nn.Module, context: TransformContext) -> None:
        """See `ModelTransform.apply`."""
        if self._freeze:
            chunk.requires_grad_(False)
        linears = chunk.linears()  # type: ignore[operator]
        for stem in self._stems:
            if stem in linears:
                part = linears[stem]
                source = LoRASource(part.source, part.blocks, rank=2, alpha=4.0, stems=[stem], seed=5)
                with torch.no_grad():
                    # Not zero, so that the first gradients reach A too; the same numbers whatever the sharding.
                    for block in part.blocks:
                        key = block.stem.replace(".", "__")
                        if key in source.lora_b:
                            full = torch.randn(block.global_shape[0], 2, generator=derived_generator(6, block.stem))
                            local = full[block.offset[0] : block.offset[0] + block.out_features]
                            source.lora_b[key].copy_(0.1 * local)
                part.replace_source(source)


def masks(model: ModelConfig) -> FixedDropMask:
    """Drops one sublayer or none; changes with the step, and between the micro-batches of a replica."""
    count = model.num_sublayers

    def mask(step: int, micro_batch: int) -> tuple[bool, ...]:
        dropped = (step + 2 * (micro_batch % 2)) % (count + 1)
        return tuple(index == dropped for index in range(count))

    return FixedDropMask(mask)


class WeightedNextToken:
    """Cross entropy with fractional weights, and a metric."""

    def weight(self, micro_batch: MicroBatch) -> float:
        """The sum of the target weights."""
        return float(micro_batch.weights.double().sum())

    def __call__(self, output: ModelOutput, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(sum of losses, how many labels are likely)."""
        logprobs = output.token_logprobs(micro_batch.labels)
        return -(logprobs * micro_batch.weights).sum(), {"likely": (logprobs > -4.0).sum().float()}


def global_batch(model: ModelConfig, step: int, seq: int = SEQ) -> list[MicroBatch]:
    """`GLOBAL_BATCH` micro-batches of one row of packed documents each."""
    batches = []
    for sample in range(GLOBAL_BATCH):
        generator = derived_generator(11, "batch", step, sample)
        tokens = torch.randint(model.vocab_size, (1, seq + 1), generator=generator)
        cut = int(torch.randint(3, seq - 3, (1,), generator=generator))
        positions = torch.cat([torch.arange(cut), torch.arange(seq - cut)])[None]
        weights = torch.rand(1, seq, generator=generator) * (torch.rand(1, seq, generator=generator) > 0.3)
        documents = (torch.arange(seq) >= cut).long()[None]
        batches.append(
            MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, positions, documents)
        )
    return batches


def scored(output: ModelOutput, micro_batch: MicroBatch) -> Tensor:
    """Log-probabilities of the labels, and some logits: `[batch, seq, 4]`."""
    logits = output.logits()
    return torch.stack(
        [output.token_logprobs(micro_batch.labels), logits.mean(-1), logits.amax(-1), logits[..., -1]], dim=-1
    )


def start(case: SeamCase, seed: int = 3) -> Engine:
    """The engine of this rank."""
    if isinstance(case.engine, MegatronEngineConfig):
        rehearsal.enable()
    transforms: list[ModelTransform] = [masks(case.model)]
    if case.lora:
        transforms.insert(0, SwapSources(case.lora_stems, case.freeze))
    return build_engine(case.engine, case.model, case.optim, transforms, SeamWeights(case.model, seed), seed)


def run(case: SeamCase, save_to: str | None = None, resume_from: str | None = None) -> SeamResult:
    """Runs the scenario on this rank, from its start or from a checkpoint that another layout wrote."""
    # Weights of another seed, so that a load that does nothing shows.
    engine = start(case, seed=3 if resume_from is None else 4)
    place = engine.topology
    result = SeamResult(dp_rank=place.dp_rank, dp_size=place.dp_size)
    first = 0
    if resume_from is not None:
        reader = CheckpointReader(resume_from)
        engine.load_slices(reader)
        engine.load_scalars(reader.trainer_state["engine"])
        first = reader.step
    share = GLOBAL_BATCH // place.dp_size

    def mine(step: int) -> StepBatch:
        rows = global_batch(case.model, step)[place.dp_rank * share : (place.dp_rank + 1) * share]
        return StepBatch(step, [row.to(engine.device) for row in rows])

    for step in range(first, STEPS):
        if step == EDIT_AFTER:
            if case.probe:
                _probe(case, engine, mine(7), result)
            if save_to is not None:
                save_checkpoint(save_to, step, engine, {})
            _edit(case, engine, result)
        stats = engine.train_step(mine(step), WeightedNextToken(), lr_factor=1.0 - 0.1 * step)
        result.losses.append(stats.loss)
        result.norms.append(stats.grad_norm)
        result.metrics.append(dict(stats.metrics))
    result.weights = {name: tensor.clone() for name, tensor in engine.export_state()}
    engine.close()
    return result


def _probe(case: SeamCase, engine: Engine, batch: StepBatch, result: SeamResult) -> None:
    def visit(name: str, gradient: Tensor) -> None:
        result.gradients[name] = gradient.cpu().clone()

    before = torch.get_rng_state()
    result.probe_loss = engine.gradients(batch, WeightedNextToken(), visit)
    if not torch.equal(before, torch.get_rng_state()):
        raise AssertionError("the probe moved the random number generator")
    result.scores = [score.cpu() for score in engine.score(batch.micro_batches, scored)]


def _edit(case: SeamCase, engine: Engine, result: SeamResult) -> None:
    def edit(name: str, master: Tensor, state: dict[str, Tensor]) -> Tensor | None:
        result.edits[name] = (master.cpu().clone(), {key: value.cpu().clone() for key, value in state.items()})
        if name == EDITED[-1]:
            return None
        rows = torch.arange(master.shape[0], device=master.device)[:, None]
        return master * 0.9 + 0.01 * torch.sin(rows.float())

    engine.edit_masters(EDITED, edit)
