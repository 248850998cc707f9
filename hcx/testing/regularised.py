"""One scenario of regularised training that every engine must run alike: quiet steps, events, steps on top of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hcx.compress.regularise import Regularise, RegulariseConfig
from hcx.compress.regularise.config import (
    BCQRule,
    LowRankRule,
    NoiseRule,
    PruneRule,
    RegulariseException,
    UniformRule,
    WeightDecayRule,
)
from hcx.dist import rehearsal
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import MegatronEngineConfig
from hcx.testing import seam
from hcx.testing.seam import SeamCase

STEPS = 4
PERIOD = 2
EVERY_RULE = RegulariseConfig(
    period=PERIOD,
    default=WeightDecayRule(strength=0.5),
    exceptions=(
        RegulariseException(pattern="*.q_proj", rule=BCQRule(bits=2, group_size=16)),
        RegulariseException(pattern="*.k_proj", rule=BCQRule(bits=3, group_size=128, method="greedy")),
        RegulariseException(pattern="*.down_proj", rule=PruneRule(fraction=0.6, scope="global")),
        RegulariseException(pattern="*.up_proj", rule=LowRankRule(rank=4, tile=(32, 64))),
        RegulariseException(pattern="*.gate_proj", rule=UniformRule(bits=4, group_size=32)),
        RegulariseException(pattern="*.v_proj", rule=NoiseRule(amplitude=0.01)),
    ),
    embedding=PruneRule(fraction=0.5),
)
"""Every rule, on weights that engines fuse, split and share."""


@dataclass
class RegularisedResult:
    """What one rank saw.

    Attributes:
        losses: of each step.
        metrics: of each step; empty where there was no event.
        weights: canonical name -> full master, after each event, by the number of steps done.
        packed: module -> the planes' dense form, of the last event; on rank 0.
    """

    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    packed: dict[str, Tensor] = field(default_factory=dict)


def run(case: SeamCase, config: RegulariseConfig, quiet: int = PERIOD, total_steps: int = STEPS) -> RegularisedResult:
    """Runs four steps on this rank; the first `quiet` ones at a learning rate of zero.

    So the first event acts on the initial weights, and its result must be the same bit for bit on every layout.
    """
    if isinstance(case.engine, MegatronEngineConfig):
        rehearsal.enable()
    transform = Regularise(config, case.model, total_steps, lr=lambda _: 0.01, lr_factor=lambda _: 1.0, seed=9)
    transforms = [transform, seam.masks(case.model)]
    engine = build_engine(case.engine, case.model, case.optim, transforms, seam.SeamWeights(case.model, 3), 3)
    place = engine.topology
    share = seam.GLOBAL_BATCH // place.dp_size
    result = RegularisedResult()
    for step in range(STEPS):
        rows = seam.global_batch(case.model, step)[place.dp_rank * share : (place.dp_rank + 1) * share]
        transform.before_step(step)
        stats = engine.train_step(StepBatch(step, rows), seam.WeightedNextToken(), float(step >= quiet))
        result.losses.append(stats.loss)
        result.metrics.append(transform.after_step(step, engine))
        if result.metrics[-1]:
            result.weights[step + 1] = {name: tensor.clone() for name, tensor in engine.export_state()}
    if total_steps == STEPS:
        transform.finalize(engine)
    else:
        result.weights[STEPS] = {name: tensor.clone() for name, tensor in engine.export_state()}
    result.packed = {stem: weight.dequantize(torch.float32) for stem, weight in transform.packed.items()}
    engine.close()
    return result
