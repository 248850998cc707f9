"""One model of a comparison: made by `hcx train` and the compressor, scored and counted alike for every method."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hcx.artifacts import find_file, is_complete
from hcx.artifacts.manifest import write_atomically
from hcx.compress import compress_model
from hcx.data import MicroBatch
from hcx.errors import TrainingError
from hcx.model.load import LoadedModel, load_model
from hcx.model.meta import ForwardMeta
from hcx.obs import read_jsonl
from hcx.recipe.checks import check_recipe
from hcx.recipe.comparison import Cell, Comparison, folder_name, overrides_of, run_name
from hcx.recipe.data import open_data
from hcx.recipe.processes import run_command
from hcx.recipe.train import TrainRecipe, load_train_recipe
from hcx.train import CheckpointReader, latest_checkpoint

Command = Callable[[Sequence[str]], str]
"""Runs an hcx command; see `run_command`."""
MASTER = "master"
FP32_BYTES = 4
COUNTS = "optimizer.json"
"""What was counted of a run's optimizer before its checkpoints were removed."""


@dataclass(frozen=True)
class Figures:
    """What was measured and counted of one model.

    Attributes:
        held_out: by language, or by source of conversations: bits per byte, or nats per trained token.
        unit: which of the two.
        accuracy: share of held-out targets that had the largest logit, by the same names.
        trained_numbers: parameters that the optimizer moved.
        optimizer_bytes: of the optimizer's state beside the fp32 masters, read from the last checkpoint.
        task_bytes: of the weight files that this task adds to the model it started from; all of them where the method
            ends in a model of its own.
        model_bytes: of all weight files that are served.
        event_share: seconds of regularisation events over those of the other work; None without events.
        train_seconds: of all steps that were logged.
    """

    held_out: dict[str, float]
    unit: str
    accuracy: dict[str, float]
    trained_numbers: int
    optimizer_bytes: int
    task_bytes: int
    model_bytes: int
    event_share: float | None
    train_seconds: float

    @property
    def mean(self) -> float:
        """Mean held-out figure, by which learning rates are chosen."""
        return sum(self.held_out.values()) / len(self.held_out)


@dataclass(frozen=True)
class Made:
    """Where a cell's model lies: a model directory, and an adapter over it where the method trains one."""

    run: Path | None
    model: Path
    adapter: Path | None = None


class Workshop:
    """Makes and measures the models of a comparison below its directory.

    Args:
        comparison: what is compared.
        command: runs hcx commands; processes of their own if not given.
    """

    def __init__(self, comparison: Comparison, command: Command = run_command) -> None:
        self._comparison, self._command = comparison, command
        self._out = Path(comparison.out)

    def meet_needs(self) -> None:
        """Makes what must be there before the first run.

        Raises:
            TrainingError: a command failed, or did not make its path.
        """
        for need in self._comparison.needs:
            if Path(need.path).exists():
                continue
            self._command(need.command)
            if not Path(need.path).exists():
                raise TrainingError(f"needs: {need.path} is still not there after hcx {' '.join(need.command)}")

    def recipe(self, cell: Cell) -> TrainRecipe:
        """The resolved training recipe of a cell.

        Raises:
            ConfigError: it cannot run.
        """
        recipe = load_train_recipe(find_file(self._comparison.recipe, "launch/train"), self._overrides(cell))
        if self._comparison.methods[cell.row.method].compress == "before":
            recipe = recipe.model_copy(update={"init_from": str(self._base_directory(cell))})
        check_recipe(recipe)
        return recipe

    def trains(self, cell: Cell) -> bool:
        """Whether a cell's method has a training run."""
        return self._comparison.methods[cell.row.method].train

    def run_of(self, cell: Cell) -> Path:
        """The directory of a cell's run; cells that share a run name one."""
        return self._out / "runs" / run_name(self._comparison, cell)

    def prepare(self, cell: Cell) -> None:
        """Makes the compressed model that a cell's training starts from, where its method wants one.

        Raises:
            HcxError: the plan cannot be applied.
        """
        if self._comparison.methods[cell.row.method].compress == "before":
            self._base(cell)

    def train(self, cell: Cell) -> None:
        """Trains a cell's run, if it is not there; an interrupted one goes on.

        Raises:
            TrainingError: training failed.
        """
        run = self.run_of(cell)
        if not (is_complete(run / self._product(cell)) and (run / COUNTS).is_file()):
            self._command(["train", self._comparison.recipe, *self._overrides(cell)])
            trained, state = optimizer_figures(run)
            counts = {"trained_numbers": trained, "optimizer_bytes": state}
            write_atomically(run / COUNTS, json.dumps(counts).encode())
        # A run's masters and moments are three times its model, and a comparison has dozens of runs.
        shutil.rmtree(run / "checkpoints", ignore_errors=True)

    def make(self, cell: Cell) -> Made:
        """Trains and compresses what is not there yet.

        Raises:
            TrainingError: training failed.
            HcxError: the plan cannot be applied.
        """
        method = self._comparison.methods[cell.row.method]
        self.prepare(cell)
        if not method.train:
            return Made(None, self._base_directory(cell))
        self.train(cell)
        run = self.run_of(cell)
        if self._product(cell) == "adapter":
            return Made(run, Path(self.recipe(cell).init_from or ""), run / "adapter")
        if method.compress != "after":
            return Made(run, run / "model")
        plan = self._comparison.formats[cell.row.format].compress
        assert plan is not None  # checked when the comparison was read
        target = run / folder_name("compressed", cell.row.format)
        if not is_complete(target):
            compress_model(run / "model", target, plan)
        return Made(run, target)

    def measure(self, cell: Cell, made: Made) -> Figures:
        """Scores and counts a cell's model.

        Raises:
            TrainingError: the recipe holds out no text.
        """
        held_out, unit, accuracy = score(self.recipe(cell), load_model(made.model, adapter=made.adapter))
        counts = {} if made.run is None else json.loads((made.run / COUNTS).read_text(encoding="utf-8"))
        whole = weight_bytes(made.model)
        task = 0 if made.run is None else whole if made.adapter is None else weight_bytes(made.adapter)
        share, seconds = (None, 0.0) if made.run is None else times(made.run)
        return Figures(
            held_out=held_out,
            unit=unit,
            accuracy=accuracy,
            trained_numbers=counts.get("trained_numbers", 0),
            optimizer_bytes=counts.get("optimizer_bytes", 0),
            task_bytes=task,
            model_bytes=whole if made.adapter is None else whole + task,
            event_share=share,
            train_seconds=seconds,
        )

    def forget(self, cell: Cell) -> None:
        """Removes what a cell's run weighs; metrics and adapter stay. Asked for again, its model is trained again."""
        run = self.run_of(cell)
        for directory in (run / "model", *run.glob("compressed*")):
            shutil.rmtree(directory, ignore_errors=True)

    def _product(self, cell: Cell) -> str:
        """The directory of a run that its training ends with."""
        # What a merged model adds to an adapter is compressed or nothing: the adapter itself is the smaller product.
        after = self._comparison.methods[cell.row.method].compress == "after"
        return "model" if after or self.recipe(cell).adapter is None else "adapter"

    def _overrides(self, cell: Cell) -> list[str]:
        places = {"out": str(self.run_of(cell))}
        base = self._base_directory(cell)
        # Before it is made, the recipe takes the shape of the model that it will be made of.
        if self._comparison.methods[cell.row.method].compress == "before" and is_complete(base):
            places["init_from"] = str(base)
        return overrides_of(self._comparison, cell, places)

    def _base_directory(self, cell: Cell) -> Path:
        return self._out / "bases" / folder_name(cell.row.format)

    def _base(self, cell: Cell) -> Path:
        """The model that training starts from, compressed to the cell's format."""
        target = self._base_directory(cell)
        if not is_complete(target):
            plan = self._comparison.formats[cell.row.format].compress
            assert plan is not None  # checked when the comparison was read
            source = load_train_recipe(
                find_file(self._comparison.recipe, "launch/train"), self._comparison.overrides
            ).init_from
            if source is None:
                raise TrainingError("compress: before needs a recipe with init_from: there is no model to compress")
            compress_model(source, target, plan)
        return target


@torch.no_grad()
def score(recipe: TrainRecipe, model: LoadedModel) -> tuple[dict[str, float], str, dict[str, float]]:
    """Held-out figures of a model on what its recipe holds out: (figure, unit, accuracy), by language or source.

    Raises:
        TrainingError: nothing is held out.
    """
    figures: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    unit = ""
    for held_out in open_data(recipe).validation:
        nats = right = count = 0.0
        for batch in held_out.micro_batches:
            found = _score_rows(model, batch)
            nats, right, count = nats + found[0], right + found[1], count + found[2]
        figures[held_out.language], unit = nats / held_out.divisor, held_out.metric
        accuracy[held_out.language] = right / count
    if not figures:
        raise TrainingError("the recipe holds out no text; build its shards with a validation part")
    return figures, unit, accuracy


def _score_rows(model: LoadedModel, batch: MicroBatch) -> tuple[float, float, float]:
    """(nats, right ones, targets) of a micro-batch; row by row, since logits of many rows are large."""
    hidden = model.decoder(batch.tokens, ForwardMeta(positions=batch.positions, document_ids=batch.document_ids))
    nats = right = count = 0.0
    for row in range(batch.tokens.shape[0]):
        weights = batch.weights[row].double()
        counted = weights > 0
        if not bool(counted.any()):
            continue
        logits = model.decoder.output(hidden[:, row : row + 1]).logits()[0, counted].float()
        labels = batch.labels[row][counted]
        picked = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        nats -= float((picked.double() * weights[counted]).sum())
        right += float((logits.argmax(-1) == labels).sum())
        count += float(counted.sum())
    return nats, right, count


def optimizer_figures(run: Path) -> tuple[int, int]:
    """(numbers that the optimizer has state for, bytes of that state) of a run's last checkpoint.

    Raises:
        TrainingError: the run has no checkpoint.
    """
    last = latest_checkpoint(run / "checkpoints")
    if last is None:
        raise TrainingError(f"{run / 'checkpoints'}: no checkpoint to count the optimizer's state of")
    reader = CheckpointReader(last)
    trained = state = 0
    for name in reader.names():
        keys = [key for key in reader.keys(name) if key != MASTER]
        if keys:
            trained += math.prod(reader.shape(name, MASTER))
            state += sum(FP32_BYTES * math.prod(reader.shape(name, key)) for key in keys)
    return trained, state


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files of a model or adapter directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def times(run: Path) -> tuple[float | None, float]:
    """(share of the events' seconds in those of the other work, seconds of all steps) of a run's metrics."""
    events = between = steps = 0.0
    for row in read_jsonl(run / "metrics.jsonl"):
        steps += float(row.get("throughput/step_s", 0.0))
        if row.get("regularise/cost"):
            events += float(row["regularise/event_s"])
            # The share is seconds of the event over those since the last one: their ratio gives the latter back.
            between += float(row["regularise/event_s"]) / float(row["regularise/cost"])
    return (events / between if between else None), steps
