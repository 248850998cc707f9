"""Small training runs: rows as a function of the step, and an objective that goes wrong at chosen samples."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcx.data.batch import MicroBatch
from hcx.engine.base import ModelOutput
from hcx.engine.build import build_engine
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.model.transforms import ModelTransform
from hcx.model.weights import InitWeights
from hcx.obs import JsonlSink
from hcx.optim import OptimConfig, Schedule
from hcx.testing.batches import packed_rows, take_rows
from hcx.testing.tiny import tiny_config
from hcx.train import NextToken, Trainer, TrainerConfig
from hcx.train.validation import ValidationSet

SEQ = 16
VOCAB = 384


class Rows:
    """A loader of random rows; step t has the samples [t * G, (t + 1) * G)."""

    def batches(
        self,
        start_step: int,
        stop_step: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        threads: int,
    ) -> Generator[list[MicroBatch]]:
        """See `Loader.batches`."""
        share = global_batch // dp_size
        for step in range(start_step, stop_step):
            rows = packed_rows(global_batch, SEQ, VOCAB, seed=step)
            rows = replace(rows, sample_ids=tuple(range(step * global_batch, (step + 1) * global_batch)))
            starts = range(dp_rank * share, (dp_rank + 1) * share, micro_batch)
            yield [take_rows(rows, start, start + micro_batch) for start in starts]

    def state_dict(self) -> dict[str, Any]:
        """See `Loader.state_dict`."""
        return {"sequence": SEQ}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Loader.load_state_dict`."""
        if dict(state) != self.state_dict():
            raise AssertionError(f"another loader's state: {state}")


class FaultyNextToken(NextToken):
    """Cross entropy, multiplied by a factor where a micro-batch holds a sample that is bad.

    Args:
        factors: sample number -> factor of the loss, NaN for one that is not a number.
        times: how often each sample is bad (a fault of the machine is not there the second time); None: always.
    """

    def __init__(self, factors: Mapping[int, float], times: int | None = None) -> None:
        self._factors, self._times = dict(factors), times
        self._seen: dict[int, int] = {}

    def __call__(self, output: ModelOutput, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `NextToken`."""
        total, metrics = super().__call__(output, micro_batch)
        for sample in micro_batch.sample_ids:
            seen = self._seen[sample] = self._seen.get(sample, 0) + 1
            if sample in self._factors and (self._times is None or seen <= self._times):
                total = total * self._factors[sample]
        return total, metrics


def small_trainer(
    directory: str | Path,
    kind: str = "adamw",
    steps: int = 6,
    stop: Callable[[], str | None] | None = None,
    precision: str = "fp32",
    objective: NextToken | None = None,
    engine: TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig | None = None,
    validate: bool = True,
    transforms: Sequence[ModelTransform] = (),
    **options: Any,
) -> Trainer:
    """A trainer of a tiny model on `Rows`; rank 0 writes `metrics.jsonl`. Options go to `TrainerConfig`."""
    config = tiny_config()
    optim = OptimConfig(kind=kind, lr=1e-2, momentum=0.9, schedule=Schedule(warmup_steps=2))  # type: ignore[arg-type]
    chosen = engine or TorchEngineConfig(precision=precision)  # type: ignore[arg-type]
    built = build_engine(chosen, config, optim, transforms, InitWeights(config, 1), 0)
    return Trainer(
        TrainerConfig(**{"steps": steps, "global_batch": 4, "micro_batch": 2, **options}),
        built,
        Rows(),
        objective or NextToken(),
        optim.schedule,
        directory,
        validation=[ValidationSet("ko", [packed_rows(2, SEQ, VOCAB, seed=100)], 50)] if validate else (),
        transforms=transforms,
        sinks=[JsonlSink(Path(directory) / "metrics.jsonl")] if built.topology.rank == 0 else (),
        stop=stop,
    )


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Canonical name -> full master weight."""
    return dict(trainer.engine.export_state())
