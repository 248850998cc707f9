"""`hcx bench dropbp RECIPE`: what dropping the backward costs in quality, at equal steps and at equal time.

One recipe, run once per arm and seed: nothing dropped, several rates, and the lowest sublayers frozen so that the
backward costs as much as at the highest rate. Held-out figures come from the runs' own validations, seconds from their
logged steps, so the curves can be made again from the run directories.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from hcx.artifacts import is_complete
from hcx.dropbp import DropBPConfig, MaskSchedule, StepCosts, Trained
from hcx.errors import ConfigError, DataError, did_you_mean
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder, Sublayer
from hcx.model.transforms import ModelTransform, TransformContext
from hcx.obs import get_logger, read_jsonl
from hcx.recipe.drop import trained_parts
from hcx.recipe.finished import require_made_from
from hcx.recipe.run import run_training
from hcx.recipe.train import TrainRecipe

log = get_logger(__name__)

FREEZE_RATE = 0.875
"""The drop rate whose backward the frozen arm costs."""
FREEZE = "freeze"
ARMS: dict[str, DropBPConfig | None] = {
    "none": None,
    "0.25": DropBPConfig(rate=0.25, allocation="uniform"),
    "0.5": DropBPConfig(rate=0.5, allocation="uniform"),
    "0.75": DropBPConfig(rate=0.75, allocation="uniform"),
    "0.875": DropBPConfig(rate=0.875, allocation="uniform"),
    "0.875-sensitivity": DropBPConfig(rate=0.875),
    FREEZE: None,
}
VALIDATION = "validation/"


@dataclass(frozen=True)
class Point:
    """A validation of a run: after `step` steps and `seconds` of training."""

    arm: str
    seed: int
    metric: str
    step: int
    seconds: float
    value: float


@dataclass(frozen=True)
class Figure:
    """A figure over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Mean, smallest and largest."""
        return cls(statistics.mean(values), min(values), max(values))


@dataclass(frozen=True)
class ArmSummary:
    """An arm's held-out figure at the last step, and after as many seconds as the fastest arm took."""

    arm: str
    metric: str
    seeds: int
    steps: int
    at_end: Figure
    seconds: Figure
    equal_seconds: float
    at_equal_time: Figure


class FrozenLowest(ModelTransform):
    """Trains the upper sublayers only: the embedding and the `count` lowest sublayers get no gradient.

    A tied output is frozen with the embedding: a gradient for it would have to flow down to the embedding.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def apply(self, chunk: nn.Module, context: TransformContext) -> None:
        """See `ModelTransform.apply`."""
        decoder = cast(Decoder, chunk)
        if decoder.embedding is not None:
            decoder.embedding.requires_grad_(False)
        if context.config.tie_embeddings and decoder.head is not None:
            decoder.head.requires_grad_(False)
        for sublayer in cast("list[Sublayer]", list(decoder.sublayers)):
            if sublayer.index < self.count:
                sublayer.requires_grad_(False)


def frozen_sublayers(model: ModelConfig, seq_len: int, trained: Trained, rate: float = FREEZE_RATE) -> int:
    """How many of the lowest sublayers to freeze so that the backward costs what it costs, on average, at a drop rate.

    Head and its gradients are left out on both sides: they differ by whether it is tied.
    """
    costs = StepCosts(model, seq_len, trained)
    schedule = MaskSchedule(0, (rate,) * model.num_sublayers, rate)
    weights = costs.weights()
    wanted = statistics.mean(
        sum(weight for weight, dropped in zip(weights, schedule.mask(step, 0), strict=True) if not dropped)
        for step in range(256)
    )

    def kept(count: int) -> float:
        first = costs.sublayers[count].backward(False) if count < len(weights) else 0
        return first + sum(weights[count + 1 :])

    return min(range(len(weights)), key=lambda count: abs(kept(count) - wanted))


def run_arms(recipe: TrainRecipe, arms: Sequence[str], seeds: int, out: Path) -> list[Point]:
    """Runs every arm with seeds 0 .. `seeds` - 1 below `out`; a run that is finished there is read, not run again.

    Raises:
        ConfigError: an arm is not known, or the recipe is not one process's.
        CheckpointError: a run that is there was made from another recipe.
    """
    for arm in arms:
        if arm not in ARMS:
            raise ConfigError(f"--arms {arm}: no such arm; {did_you_mean(arm, ARMS)}")
    if recipe.world_size != 1:
        raise ConfigError(f"hcx bench dropbp runs one process; the recipe needs {recipe.world_size}")
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: must be at least 1")
    points: list[Point] = []
    for seed in range(seeds):
        for arm in arms:
            directory = out / f"{arm}-seed{seed}"
            changes = {"out": str(directory), "seed": seed, "dropbp": ARMS[arm], "name": f"{recipe.name}-{arm}"}
            mine, kind = recipe.model_copy(update=changes), "adapter" if recipe.adapter else "model"
            if is_complete(directory / kind):
                require_made_from(directory / kind, kind, mine)
            else:
                log.info("arm %s, seed %d", arm, seed)
                extra: list[ModelTransform] = []
                if arm == FREEZE:
                    extra = [FrozenLowest(frozen_sublayers(recipe.model, recipe.data.seq_len, trained_parts(recipe)))]
                run_training(mine, extra=extra)
            points += read_points(directory, arm, seed)
    return points


def read_points(directory: Path, arm: str, seed: int) -> list[Point]:
    """The validations of a run with the seconds of training before each.

    Raises:
        DataError: the run scored nothing.
    """
    seconds: dict[int, float] = {0: 0.0}
    found: list[Point] = []
    for row in read_jsonl(directory / "metrics.jsonl"):
        step = int(row.get("step", 0))
        if "throughput/step_s" in row:
            seconds[step] = seconds.get(step - 1, 0.0) + float(row["throughput/step_s"])
        found += [
            Point(arm, seed, key.removeprefix(VALIDATION), step, seconds.get(step, 0.0), float(value))
            for key, value in row.items()
            if key.startswith(VALIDATION) and isinstance(value, (int, float))
        ]
    if not found:
        raise DataError(f"{directory}: the run scored no held-out text; the recipe needs shards with a validation part")
    return found


def at_time(points: Sequence[Point], seconds: float) -> float:
    """The held-out figure of one run after some seconds, between its validations by the straight line."""
    ordered = sorted(points, key=lambda point: point.step)
    for before, after in itertools.pairwise(ordered):
        if before.seconds <= seconds <= after.seconds and after.seconds > before.seconds:
            share = (seconds - before.seconds) / (after.seconds - before.seconds)
            return before.value + share * (after.value - before.value)
    return ordered[-1].value if seconds >= ordered[-1].seconds else ordered[0].value


def summarise(points: Sequence[Point]) -> list[ArmSummary]:
    """Each arm and metric, in the order of the runs."""
    runs: dict[tuple[str, str], dict[int, list[Point]]] = {}
    for point in points:
        runs.setdefault((point.metric, point.arm), {}).setdefault(point.seed, []).append(point)
    summaries = []
    for metric in dict.fromkeys(metric for metric, _ in runs):
        arms = {arm: by_seed for (name, arm), by_seed in runs.items() if name == metric}
        lasts = {arm: [max(run, key=lambda p: p.step) for run in by_seed.values()] for arm, by_seed in arms.items()}
        fastest = min(statistics.mean(last.seconds for last in found) for found in lasts.values())
        for arm, by_seed in arms.items():
            summaries.append(
                ArmSummary(
                    arm=arm,
                    metric=metric,
                    seeds=len(by_seed),
                    steps=lasts[arm][0].step,
                    at_end=Figure.of([last.value for last in lasts[arm]]),
                    seconds=Figure.of([last.seconds for last in lasts[arm]]),
                    equal_seconds=fastest,
                    at_equal_time=Figure.of([at_time(run, fastest) for run in by_seed.values()]),
                )
            )
    return summaries


def mean_curves(points: Sequence[Point], metric: str) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Curves over `step` and over `seconds`: axis -> arm -> (x, y), means over seeds at each validation."""
    result: dict[str, dict[str, tuple[list[float], list[float]]]] = {"step": {}, "seconds": {}}
    for arm in dict.fromkeys(point.arm for point in points):
        mine: dict[int, list[Point]] = {}
        for point in points:
            if point.arm == arm and point.metric == metric:
                mine.setdefault(point.step, []).append(point)
        steps = sorted(mine)
        values = [statistics.mean(point.value for point in mine[step]) for step in steps]
        result["step"][arm] = ([float(step) for step in steps], values)
        result["seconds"][arm] = ([statistics.mean(p.seconds for p in mine[step]) for step in steps], values)
    return result


def as_row(point: Point) -> Mapping[str, Any]:
    """For CSV."""
    return {name: getattr(point, name) for name in ("arm", "seed", "metric", "step", "seconds", "value")}
