"""What one process of a rehearsal does: a few steps of a tiny model, on whatever engine and layout.

The same function makes the one-process reference. Started as a program (`python -m hcx.launch.rehearsal_case DIR`) it
is one rank of a rehearsal: it reads `DIR/cases.json` and writes `DIR/rank-N.json`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hcx.artifacts.manifest import write_atomically
from hcx.config import Config
from hcx.data.batch import MicroBatch
from hcx.dist import derived_generator, init_process_group, rehearsal
from hcx.dist.topology import destroy_process_group, process_environment
from hcx.engine.base import Engine, StepBatch
from hcx.engine.build import build_engine
from hcx.engine.common import storage_bytes
from hcx.engine.config import EngineConfig, MegatronEngineConfig
from hcx.errors import HcxError
from hcx.model.adapters import LoRA, LoRAConfig
from hcx.model.config import ModelConfig
from hcx.model.weights import InitWeights
from hcx.optim import OptimConfig
from hcx.train import CheckpointReader, build_objective
from hcx.train.objectives import NextTokenConfig, ObjectiveConfig
from hcx.train.saving import save_checkpoint

STEPS = 5
SAVE_AFTER = 3
"""Steps done when a case that is saved writes its checkpoint."""
GLOBAL_BATCH = 4
SEQ_LEN = 32


class RehearsalCase(Config):
    """What every process runs alike."""

    engine: EngineConfig
    """The reduced layout."""
    model: ModelConfig
    """A tiny decoder with the recipe's options."""
    optim: OptimConfig
    """The recipe's optimizer, with an epsilon at which engines can be compared."""
    objective: ObjectiveConfig = NextTokenConfig()
    """The recipe's loss."""
    adapter: LoRAConfig | None = None
    """A low-rank adapter, where the recipe trains one."""
    seed: int = 0
    """Of weights and data."""
    save_to: str | None = None
    """Where to write a checkpoint after a few steps."""
    resume_from: str | None = None
    """A checkpoint to go on from."""


@dataclass
class RankReport:
    """What one process saw.

    Attributes:
        pp_rank, dp_rank: its place.
        losses, grad_norms: of each step, the same on every rank.
        held: bytes by kind that it holds after the steps.
        redirected: whether CUDA calls were redirected to the CPU.
    """

    pp_rank: int
    dp_rank: int
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    redirected: bool = False


def run_case(case: RehearsalCase) -> RankReport:
    """Builds the engine of this process, makes the steps, and measures what it holds; collective."""
    if isinstance(case.engine, MegatronEngineConfig) and not torch.cuda.is_available():
        rehearsal.enable()
    transforms = [] if case.adapter is None else [LoRA(case.adapter, case.seed)]
    engine = build_engine(
        case.engine, case.model, case.optim, transforms, InitWeights(case.model, case.seed), case.seed
    )
    place = engine.topology
    report = RankReport(place.pp_rank, place.dp_rank, redirected=rehearsal.is_enabled())
    first = 0
    if case.resume_from is not None:
        reader = CheckpointReader(case.resume_from)
        engine.load_slices(reader)
        engine.load_scalars(reader.trainer_state["engine"])
        first = reader.step
    objective = build_objective(case.objective)
    for step in range(first, STEPS):
        if case.save_to is not None and step == SAVE_AFTER:
            save_checkpoint(case.save_to, step, engine, {})
        stats = engine.train_step(_batch(case, step, engine), objective, lr_factor=1.0)
        report.losses.append(stats.loss)
        report.grad_norms.append(stats.grad_norm)
    report.held = storage_bytes(engine.held_tensors())
    engine.close()
    return report


def run_cases(cases: list[RehearsalCase]) -> list[RankReport]:
    """One rank's part: every case, in order; collective."""
    return [run_case(case) for case in cases]


def _batch(case: RehearsalCase, step: int, engine: Engine) -> StepBatch:
    """This replica's rows of the step's batch, one row per micro-batch, so that gradients accumulate."""
    share = GLOBAL_BATCH // engine.topology.dp_size
    first = engine.topology.dp_rank * share
    rows = [_row(case, step, sample) for sample in range(first, first + share)]
    return StepBatch(step, [row.to(engine.device) for row in rows])


def _row(case: RehearsalCase, step: int, sample: int) -> MicroBatch:
    """A row of two random documents, with uneven weights: a function of (seed, step, sample)."""
    generator = derived_generator(case.seed, "rehearsal", step, sample)
    tokens = torch.randint(case.model.vocab_size, (1, SEQ_LEN + 1), generator=generator)
    cut = int(torch.randint(3, SEQ_LEN - 3, (), generator=generator))
    places = torch.arange(SEQ_LEN)
    return MicroBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        weights=torch.rand(1, SEQ_LEN, generator=generator),
        positions=torch.where(places < cut, places, places - cut)[None],
        document_ids=(places >= cut).long()[None],
        sample_ids=(step * GLOBAL_BATCH + sample,),
    )


def write_cases(directory: Path, cases: list[RehearsalCase]) -> None:
    """What the ranks read."""
    (directory / "cases.json").write_text(
        json.dumps([case.model_dump(mode="json") for case in cases]), encoding="utf-8"
    )


def read_reports(directory: Path, world_size: int) -> list[list[RankReport]]:
    """What the ranks wrote: of each rank, a report of every case."""
    texts = [(directory / f"rank-{rank}.json").read_text(encoding="utf-8") for rank in range(world_size)]
    return [[RankReport(**report) for report in json.loads(text)] for text in texts]


def main(directory: Path) -> None:
    """One rank: every case, in order."""
    torch.set_num_threads(1)
    values: list[dict[str, Any]] = json.loads((directory / "cases.json").read_text(encoding="utf-8"))
    cases = [RehearsalCase.model_validate_json(json.dumps(value)) for value in values]
    init_process_group()
    reports = [asdict(report) for report in run_cases(cases)]
    rank, _, _ = process_environment()
    write_atomically(directory / f"rank-{rank}.json", json.dumps(reports).encode())
    destroy_process_group()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except HcxError as error:
        sys.stderr.write(f"hcx: {error}\n")
        sys.exit(2)
