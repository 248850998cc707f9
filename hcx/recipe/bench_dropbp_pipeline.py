"""`hcx bench train --dropbp --pipeline`: does a pipeline get the saving, with equal drops per stage and without?

Two stages of the Megatron engine, eight micro-batches, steps without drops, with the same number of drops in each
stage, and with masks drawn over the whole model, in turn. The saving is compared with what the sublayers' operations
predict, head and embedding left out: nothing of those is ever dropped, and only one stage has each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed

from hcx.dist import rehearsal
from hcx.dropbp import MaskSchedule, StepCosts
from hcx.dropbp.masks import Mask
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import MegatronEngineConfig
from hcx.model.meta import ForwardMeta
from hcx.model.transforms import FixedDropMask, ModelTransform
from hcx.model.weights import InitWeights
from hcx.obs.machine import cpu_name
from hcx.optim import OptimConfig
from hcx.recipe.bench_dropbp import shape
from hcx.recipe.bench_train import median_interval, random_batch
from hcx.train import NextToken

STAGES, MICRO_BATCHES = 2, 8
WANTED = 0.85
"""Share of the predicted saving that the balanced schedule should reach."""


@dataclass(frozen=True)
class PipelineRow:
    """One schedule: `reached` is its saving of time over the predicted saving of operations."""

    masks: str
    rate: float
    realised: float
    pairs: int
    ratio: float
    ratio_predicted: float
    reached: float
    reached_low: float
    reached_high: float
    rows: int
    seq_len: int
    stages: int
    micro_batches: int
    device: str
    threads: int
    torch: str

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


class _Chosen(ModelTransform):
    """The masks of whichever schedule is being timed."""

    def __init__(self) -> None:
        self.schedule: MaskSchedule | None = None

    def context(self, step: int, micro_batch: int, meta: ForwardMeta) -> ForwardMeta:
        schedule = self.schedule
        return meta if schedule is None else FixedDropMask(schedule.mask).context(step, micro_batch, meta)


def measure_pipeline(rate: float, pairs: int, quick: bool = False, warmup: int = 2) -> list[PipelineRow]:
    """Times the three schedules; every rank calls it, and every rank gets the rows.

    A step's time is that of the slower rank.
    """
    rehearsal.enable()
    model = shape(128, 4, 352, 128) if quick else shape(384, 8, 1024, 128)
    rows, seq_len = (1, 64) if quick else (2, 256)
    chosen = _Chosen()
    engine = build_engine(
        MegatronEngineConfig(pipeline_parallel=STAGES, data_parallel=1, clip_grad_norm=0.0),
        model,
        OptimConfig(kind="sgd", lr=1e-4, momentum=0.0),
        [chosen],
        InitWeights(model, 0),
        0,
    )
    rates = (rate,) * model.num_sublayers
    schedules = {
        "none": None,
        "equal drops per stage": MaskSchedule(1, rates, rate, stages=STAGES),
        "drawn over the whole model": MaskSchedule(1, rates, rate),
    }
    objective = NextToken()
    times: dict[str, list[float]] = {name: [] for name in schedules}
    names = list(schedules)
    for number in range(warmup + pairs):
        batches = [
            random_batch(model.vocab_size, rows, seq_len, 1000 * number + index, engine.device)
            for index in range(MICRO_BATCHES)
        ]
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            chosen.schedule = schedules[name]
            torch.distributed.barrier()
            begun = time.perf_counter()
            engine.train_step(StepBatch(number, batches), objective, 1.0)
            seconds = torch.tensor(time.perf_counter() - begun)
            torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
            if number >= warmup:
                times[name].append(float(seconds))
    engine.close()
    steps = range(warmup, warmup + pairs)
    costs = StepCosts(model, seq_len)
    return [
        _row(name, rate, schedule, steps, costs, times, rows, seq_len)
        for name, schedule in schedules.items()
        if schedule is not None
    ]


def _row(
    name: str,
    rate: float,
    schedule: MaskSchedule,
    steps: Sequence[int],
    costs: StepCosts,
    times: dict[str, list[float]],
    rows: int,
    seq_len: int,
) -> PipelineRow:
    masks: list[Mask] = [schedule.mask(step, index) for step in steps for index in range(MICRO_BATCHES)]
    saving = costs.saving(masks)
    forward = sum(cost.forward for cost in costs.sublayers)
    backward = sum(cost.backward() for cost in costs.sublayers)
    predicted = saving.weighted_rate * backward / (forward + backward)
    ratios = [dropped / none for dropped, none in zip(times[name], times["none"], strict=True)]
    low, high = median_interval(ratios)
    ratio = statistics.median(ratios)
    return PipelineRow(
        masks=name,
        rate=rate,
        realised=saving.weighted_rate,
        pairs=len(ratios),
        ratio=ratio,
        ratio_predicted=1 - predicted,
        reached=(1 - ratio) / predicted,
        reached_low=(1 - high) / predicted,
        reached_high=(1 - low) / predicted,
        rows=rows,
        seq_len=seq_len,
        stages=STAGES,
        micro_batches=MICRO_BATCHES,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
