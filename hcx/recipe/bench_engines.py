"""`hcx bench train --engine`: what the seam costs over the library's own minimal loop.

Two processes, same shape, rows, accumulation, optimizer and clipping, fp32. Steps of both alternate in one set of
processes, the first of a pair by turns; a step's time is that of the slower rank. `ratio` is the engine's time over the
loop's: at most 1.03 is the aim.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed

from hcx.data.batch import MicroBatch
from hcx.dist import rehearsal
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import DeepSpeedEngineConfig, EngineConfig, MegatronEngineConfig
from hcx.model.config import ModelConfig
from hcx.model.flops import parameter_count
from hcx.model.weights import InitWeights
from hcx.obs import get_logger
from hcx.obs.machine import cpu_name
from hcx.optim import OptimConfig
from hcx.recipe.bench_train import in_turns, median_interval, random_batch
from hcx.recipe.engine_peers import CLIP, LEARNING_RATE, Loop, deepspeed_loop, megatron_loop
from hcx.train import NextToken

RANKS = 2
WANTED = 1.03
"""The engine's step may take this many times the loop's."""

Library = Literal["deepspeed", "megatron"]

log = get_logger(__name__)


@dataclass(frozen=True)
class EngineCase:
    """One comparison: a layout of the engine, and whose model the loop trains."""

    name: str
    engine: EngineConfig
    loop: Literal["transformers", "the same decoder", "GPTModel"]


@dataclass(frozen=True)
class EngineRow:
    """The outcome of a case; times are medians of the slower rank's steps."""

    engine: str
    layout: str
    loop: str
    parameters: int
    rows: int
    seq_len: int
    micro_batches: int
    pairs: int
    hcx_ms: float
    loop_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    device: str
    threads: int
    torch: str

    @property
    def met(self) -> bool:
        """Whether the interval of the median ratio includes at most what is wanted."""
        return self.ratio_low <= WANTED

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


def engine_cases(library: Library, quick: bool) -> list[EngineCase]:
    """Every stage of ZeRO, or every kind of parallelism, on two processes."""
    if library == "deepspeed":
        found = [
            EngineCase(f"ZeRO {stage}", DeepSpeedEngineConfig(zero_stage=stage, clip_grad_norm=CLIP), loop)
            for stage in (0, 1, 2, 3)
            for loop in ("the same decoder", "transformers")
            # The library gathers stage 3's weights for the module that holds them; the decoder's output uses another's.
            if (stage, loop) != (3, "the same decoder")
        ]
        return [case for case in found if case.name == "ZeRO 1"] if quick else found
    layouts: dict[str, dict[str, Any]] = {
        "tensor parallel": {"tensor_parallel": 2},
        "tensor and sequence parallel": {"tensor_parallel": 2, "sequence_parallel": True},
        "pipeline": {"pipeline_parallel": 2},
        "data parallel": {},
        "data parallel, distributed optimizer": {"distributed_optimizer": True},
    }
    return [
        EngineCase(name, MegatronEngineConfig(clip_grad_norm=CLIP, **layout), "GPTModel")
        for name, layout in layouts.items()
    ]


def measure_engines(library: Library, pairs: int, quick: bool = False, warmup: int = 3) -> Iterator[EngineRow]:
    """Times case by case; every rank goes through it, and every rank gets the rows."""
    if not torch.cuda.is_available():
        rehearsal.enable()
    rows, seq_len, micro_batches = (1, 32, 2) if quick else (4, 256, 2)
    model = ModelConfig(
        vocab_size=512 if quick else 4096,
        hidden_size=128 if quick else 256,
        intermediate_size=352 if quick else 704,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=seq_len,
        tie_embeddings=True,
    )
    for case in engine_cases(library, quick):
        log.info("%s, %s, beside a loop over %s", library, case.name, case.loop)
        yield _measure(library, case, model, (rows, seq_len, micro_batches), pairs, warmup)
        gc.collect()


def _measure(
    library: Library, case: EngineCase, model: ModelConfig, size: tuple[int, int, int], pairs: int, warmup: int
) -> EngineRow:
    rows, seq_len, micro_batches = size
    engine = build_engine(case.engine, model, OptimConfig(lr=LEARNING_RATE), [], InitWeights(model, 0), 0)
    objective = NextToken()
    number = 0

    def ours(batches: Sequence[MicroBatch]) -> None:
        engine.train_step(StepBatch(number, batches), objective, 1.0)

    library_engine: Any = None
    loop: Loop
    if isinstance(case.engine, DeepSpeedEngineConfig):
        own = case.loop == "the same decoder"
        loop, library_engine = deepspeed_loop(model, case.engine.zero_stage, micro_batches, own)
    else:
        assert isinstance(case.engine, MegatronEngineConfig)
        loop = megatron_loop(model, case.engine, rows, seq_len)
    times: list[tuple[float, float]] = []
    for number in range(warmup + pairs):
        # Replicas read rows of their own; ranks of one replica must read the same.
        seed = 1000 * number + engine.topology.dp_rank
        batches = [
            random_batch(model.vocab_size, rows, seq_len, seed + 100 * index, engine.device)
            for index in range(micro_batches)
        ]
        pair = in_turns(number, partial(_timed, ours, batches), partial(_timed, loop, batches))
        if number >= warmup:
            times.append(pair)
    engine.close()
    if library_engine is not None:
        library_engine.destroy()
    ratios = [own_s / loop_s for own_s, loop_s in times]
    low, high = median_interval(ratios)
    return EngineRow(
        engine=library,
        layout=case.name,
        loop=case.loop,
        parameters=parameter_count(model),
        rows=rows,
        seq_len=seq_len,
        micro_batches=micro_batches,
        pairs=pairs,
        hcx_ms=1e3 * statistics.median(own_s for own_s, _ in times),
        loop_ms=1e3 * statistics.median(loop_s for _, loop_s in times),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def _timed(step: Callable[[Sequence[MicroBatch]], object], batches: Sequence[MicroBatch]) -> float:
    torch.distributed.barrier()
    begun = time.perf_counter()
    step(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - begun, device=batches[0].tokens.device)
    torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
    return float(seconds)
