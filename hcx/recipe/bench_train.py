"""`hcx bench train`: tokens per second of the torch engine beside a plain torch loop over a transformers model.

Same shape, precision, attention (SDPA), optimizer (fused AdamW), clipping, batch and packing. Steps of both alternate
in one process, so that a noisy machine disturbs both alike; the result is the median of the paired ratios with a
bootstrap interval. In bf16 both keep fp32 masters: the loop through autocast, the engine through its working copy.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hcx.data.batch import MicroBatch
from hcx.engine.base import StepBatch
from hcx.engine.config import TorchEngineConfig
from hcx.engine.torch_engine import TorchEngine
from hcx.model.config import ModelConfig
from hcx.model.convert.peer import transformers_model, transformers_version
from hcx.model.flops import parameter_count
from hcx.model.weights import InitWeights
from hcx.obs.machine import cpu_name
from hcx.optim import OptimConfig
from hcx.train import NextToken

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class TrainCase:
    """One comparison.

    Attributes:
        name: of the shape.
        model: the shape.
        rows, seq_len: of a micro-batch.
        micro_batches: per optimizer step.
        precision: `fp32` or `bf16`.
        packed: rows hold several documents that do not see each other; else each row is one document.
    """

    name: str
    model: ModelConfig
    rows: int
    seq_len: int
    micro_batches: int
    precision: Literal["fp32", "bf16"]
    packed: bool


@dataclass(frozen=True)
class TrainRow:
    """The outcome of a case: `ratio` above 1 means that the engine is faster."""

    case: str
    parameters: int
    rows: int
    seq_len: int
    micro_batches: int
    precision: str
    packed: bool
    pairs: int
    hcx_tokens_per_s: float
    transformers_tokens_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    device: str
    threads: int
    torch: str
    transformers: str

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


def _shape(hidden: int, layers: int, vocab: int, inner: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=hidden // 64,
        num_kv_heads=max(1, hidden // 128),
        tie_embeddings=True,
        max_seq_len=4096,
    )


def cases(quick: bool, cuda: bool) -> list[TrainCase]:
    """What is measured: the demo's shape on any machine, a larger one unless `quick`, a 1B shape on a GPU."""
    small = _shape(256, 4, 4096, 704)
    found = [TrainCase("demo-4M", small, 8, 256, 1, "bf16", True)]
    if quick:
        return found
    found += [
        TrainCase("demo-4M", small, 8, 256, 1, "fp32", True),
        TrainCase("demo-4M", small, 8, 256, 1, "bf16", False),
        TrainCase("demo-4M", small, 8, 256, 4, "bf16", True),
        TrainCase("base-34M", _shape(512, 8, 16384, 1408), 4, 512, 1, "bf16", True),
        TrainCase("base-34M", _shape(512, 8, 16384, 1408), 4, 512, 1, "fp32", True),
    ]
    if cuda:
        found.append(TrainCase("large-1B", _shape(2048, 16, 65536, 5632), 4, 4096, 1, "bf16", True))
    return found


def _micro_batch(case: TrainCase, seed: int, device: torch.device) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, case.model.vocab_size, (case.rows, case.seq_len + 1), generator=generator)
    positions = torch.arange(case.seq_len).expand(case.rows, -1).contiguous()
    documents = None
    if case.packed:
        # Four documents per row, cut at the same places in every run.
        edges = sorted(random.Random(seed).sample(range(16, case.seq_len - 16), 3))
        documents = torch.zeros(case.rows, case.seq_len, dtype=torch.int64)
        for number, edge in enumerate(edges, 1):
            documents[:, edge:] = number
            positions[:, edge:] = torch.arange(case.seq_len - edge)
    return MicroBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        weights=torch.ones(case.rows, case.seq_len),
        positions=positions,
        document_ids=documents,
    ).to(device)


def _engine_step(case: TrainCase) -> tuple[Callable[[int, Sequence[MicroBatch]], None], torch.device]:
    engine = TorchEngine(
        engine_config=TorchEngineConfig(precision=case.precision, clip_grad_norm=1.0),
        model_config=case.model,
        optim_config=OptimConfig(lr=LEARNING_RATE),
        weights=InitWeights(case.model, 0),
    )
    objective = NextToken()

    def step(number: int, batches: Sequence[MicroBatch]) -> None:
        engine.train_step(StepBatch(number, batches), objective, 1.0)

    return step, engine.device


def _transformers_step(case: TrainCase, device: torch.device) -> Callable[[int, Sequence[MicroBatch]], None]:
    model = transformers_model(case.model).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    low = case.precision == "bf16"

    def step(number: int, batches: Sequence[MicroBatch]) -> None:
        weight = sum(float(batch.weights.sum()) for batch in batches)
        for batch in batches:
            mask = None if batch.document_ids is None else _mask(batch.document_ids)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
                logits = model(input_ids=batch.tokens, position_ids=batch.positions, attention_mask=mask).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), batch.labels.flatten(), reduction="none"
            )
            ((loss * batch.weights.flatten()).sum() / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _mask(document_ids: Tensor) -> Tensor:
    """`[batch, 1, seq, seq]` bool: what transformers takes for packed documents under SDPA."""
    return (document_ids[:, :, None] == document_ids[:, None, :]).tril_()[:, None]


def measure(case: TrainCase, pairs: int, warmup: int = 3) -> TrainRow:
    """Alternates steps of both, the first of a pair by turns."""
    ours, device = _engine_step(case)
    theirs = _transformers_step(case, device)
    batches = [
        [_micro_batch(case, 100 * number + index, device) for index in range(case.micro_batches)] for number in range(4)
    ]

    def timed(step: Callable[[int, Sequence[MicroBatch]], None], number: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        step(number, batches[number % len(batches)])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    times: list[tuple[float, float]] = []
    gc.collect()
    for number in range(warmup + pairs):
        pair = in_turns(number, partial(timed, ours, number), partial(timed, theirs, number))
        if number >= warmup:
            times.append(pair)
    ratios = [theirs_s / ours_s for ours_s, theirs_s in times]
    low, high = median_interval(ratios)
    tokens = case.rows * case.seq_len * case.micro_batches
    return TrainRow(
        case=case.name,
        parameters=parameter_count(case.model),
        rows=case.rows,
        seq_len=case.seq_len,
        micro_batches=case.micro_batches,
        precision=case.precision,
        packed=case.packed,
        pairs=pairs,
        hcx_tokens_per_s=tokens / statistics.median(ours_s for ours_s, _ in times),
        transformers_tokens_per_s=tokens / statistics.median(theirs_s for _, theirs_s in times),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        device=torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers_version(),
    )


def in_turns(number: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float]:
    """(ours, theirs) of the pair with this number; which goes first changes from pair to pair."""
    if number % 2:
        second = theirs()
        return ours(), second
    return ours(), theirs()


def random_batch(vocab: int, rows: int, seq_len: int, seed: int, device: torch.device) -> MicroBatch:
    """Rows of one document each, `[rows, seq_len]`, a function of the seed."""
    tokens = torch.randint(vocab, (rows, seq_len + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(seq_len).expand(rows, -1).contiguous()
    weights = torch.ones(rows, seq_len)
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, positions).to(device)


def median_interval(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
