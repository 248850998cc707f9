"""Running a comparison: every cell once, a learning rate chosen per row, and what was found as a table.

`cells.jsonl` and `tasks.jsonl` are the ledgers of what is done, a line each: a comparison that was stopped goes on at
the first cell that they lack. A cell that failed is booked as failed, and tried again by the next call.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hcx.artifacts.manifest import write_atomically
from hcx.config import dump_yaml
from hcx.config.decode import load_yaml
from hcx.errors import ConfigError, TrainingError
from hcx.obs import get_logger
from hcx.recipe.ahead import Ahead, threads_of
from hcx.recipe.comparison import Cell, Comparison, Row, folder_name, rows_of, run_name
from hcx.recipe.comparison_cell import Command, Figures, Made, Workshop
from hcx.recipe.processes import Commands

log = get_logger(__name__)

CELLS, TASKS, RECIPE = "cells.jsonl", "tasks.jsonl", "comparison.yaml"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean, smallest, largest and standard deviation (NaN for one seed)."""

    mean: float
    low: float
    high: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.mean(values), min(values), max(values), deviation)


@dataclass(frozen=True)
class RowResult:
    """A row of the table.

    Attributes:
        row: which.
        lr: the learning rate that was chosen; None: the recipe's.
        tried: learning rate -> mean held-out figure with the first seed.
        seeds: with a result.
        held_out: by language or source.
        mean: over languages or sources.
        accuracy: by language or source.
        tasks: `TASK METRIC` -> score.
        figures: of the first seed, for counts that do not depend on it.
        event_share: over seeds; None without events.
        problem: why it has no result, or None.
    """

    row: Row
    lr: float | None = None
    tried: Mapping[str, float] | None = None
    seeds: int = 0
    held_out: Mapping[str, Spread] | None = None
    mean: Spread | None = None
    accuracy: Mapping[str, Spread] | None = None
    tasks: Mapping[str, Spread] | None = None
    figures: Figures | None = None
    event_share: float | None = None
    problem: str | None = None


class Ledger:
    """What is done, by the keys of cells; a line is whole or absent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = {}
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").split("\n")
        for line in lines[:-1]:
            entry = json.loads(line)
            self.found[entry.pop("cell")] = entry
        if lines[-1]:  # cut short by the end of the process that wrote it
            write_atomically(path, "".join(line + "\n" for line in lines[:-1]).encode())

    def add(self, key: str, entry: Mapping[str, Any]) -> None:
        """Books a cell."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": key, **entry}, ensure_ascii=False) + "\n")
        self.found[key] = dict(entry)


class Run:
    """A comparison on its way.

    Args:
        comparison: what is compared.
        command: runs hcx commands; processes of their own if not given.
        workshop: makes and measures models; one over `command` if not given.
        jobs: training runs beside each other, each with its share of the CPU's threads.

    Raises:
        ConfigError: the directory holds another comparison.
    """

    def __init__(
        self,
        comparison: Comparison,
        command: Command | None = None,
        workshop: Workshop | None = None,
        jobs: int = 1,
    ) -> None:
        self._comparison, self._jobs = comparison, jobs
        self._command = command or Commands(threads_of(jobs))
        self._workshop = workshop or Workshop(comparison, self._command)
        self._out = Path(comparison.out)
        self._out.mkdir(parents=True, exist_ok=True)
        _same_recipe(comparison, self._out / RECIPE)
        self._cells, self._tasks = Ledger(self._out / CELLS), Ledger(self._out / TASKS)

    def run(self) -> list[RowResult]:
        """Makes every cell that is missing, and returns the table.

        Raises:
            ConfigError: a recipe cannot run; told before the first run.
            TrainingError: what is needed could not be made.
        """
        self._workshop.meet_needs()
        check_comparison(self._comparison)
        chosen = self._comparison
        rows = {name: [row for row in rows_of(chosen) if row.method == name] for name in chosen.methods}
        commands = self._command if isinstance(self._command, Commands) else None
        with Ahead(self._workshop, self._jobs, commands) as ahead:
            # The first seed of everything comes first: stopped early, that is a whole table.
            first = {name: list(self._first_cells(mine)) for name, mine in rows.items()}
            ahead.start(cell for cells in first.values() for cell in cells if not self._booked(cell))
            later: dict[str, list[Cell]] = {}
            for name, mine in rows.items():
                for cell in first[name]:
                    self._cell(cell, ahead)
                later[name] = list(self._later_cells(mine))
                ahead.start(cell for cell in later[name] if not self._booked(cell))
            results: list[RowResult] = []
            for name, mine in rows.items():
                for cell in later[name]:
                    self._cell(cell, ahead)
                for row in mine:
                    self._score_tasks(row)
                results += [self._result(row) for row in mine]
                self._tidy(name, mine)
        return results

    def _first_cells(self, rows: Sequence[Row]) -> Iterator[Cell]:
        """Rows of one method with the first seed, at every learning rate; rows that share a run follow each other."""
        for number in range(max(len(self._comparison.rates_of(row)) for row in rows)):
            for row in rows:
                yield Cell(row, self._comparison.rates_of(row)[number], self._comparison.seeds_of(row)[0])

    def _later_cells(self, rows: Sequence[Row]) -> Iterator[Cell]:
        """Rows of one method with the other seeds, at the rates that were best with the first."""
        for number in range(1, max(len(self._comparison.seeds_of(row)) for row in rows)):
            for row in rows:
                best, seeds = self._best(row), self._comparison.seeds_of(row)
                if best is not None and number < len(seeds):
                    yield Cell(row, best.lr, seeds[number])

    def results(self) -> list[RowResult]:
        """The table of what is booked so far; makes nothing."""
        return [self._result(row) for row in rows_of(self._comparison)]

    def _booked(self, cell: Cell) -> bool:
        return "problem" not in self._cells.found.get(cell.key, {"problem": "not run yet"})

    def _cell(self, cell: Cell, ahead: Ahead) -> None:
        if self._booked(cell):
            return
        log.info("%s: %s", cell.row.format, run_name(self._comparison, cell))
        try:
            ahead.wait(cell)
            figures = self._workshop.measure(cell, self._workshop.make(cell))
            if not all(math.isfinite(value) for value in figures.held_out.values()):
                raise TrainingError("the held-out figure is no number: it diverged")
        except TrainingError as error:
            log.warning("%s failed: %s", run_name(self._comparison, cell), error)
            self._cells.add(cell.key, {"problem": str(error)})
            return
        self._cells.add(cell.key, asdict(figures))

    def _figures(self, cell: Cell) -> Figures | None:
        entry = self._cells.found.get(cell.key)
        return None if entry is None or "problem" in entry else Figures(**entry)

    def _best(self, row: Row) -> Cell | None:
        """The cell of the first seed whose learning rate is best; None where all failed."""
        first = self._comparison.seeds_of(row)[0]
        cells = [Cell(row, rate, first) for rate in self._comparison.rates_of(row)]
        scored = [(figures.mean, cell) for cell in cells if (figures := self._figures(cell)) is not None]
        return min(scored, key=lambda pair: pair[0])[1] if scored else None

    def _score_tasks(self, row: Row) -> None:
        best = self._best(row)
        if best is None or not self._comparison.tasks:
            return
        for seed in self._comparison.seeds_of(row):
            cell = Cell(row, best.lr, seed)
            if cell.key not in self._tasks.found and self._figures(cell) is not None:
                self._tasks.add(cell.key, self._evaluate(cell))

    def _evaluate(self, cell: Cell) -> dict[str, float]:
        """`TASK METRIC` -> score of a cell's model."""
        made = self._workshop.make(cell)
        out = self._out / "tasks" / folder_name(run_name(self._comparison, cell), cell.row.format)
        words = ["eval", str(made.model), "--tasks", ",".join(self._comparison.tasks), "--out", str(out), "--json"]
        if made.adapter is not None:
            words += ["--adapter", str(made.adapter)]
        if self._comparison.task_limit is not None:
            words += ["--limit", str(self._comparison.task_limit)]
        if not (out / "results.json").is_file():
            self._command(words)
        told = json.loads((out / "results.json").read_text(encoding="utf-8"))
        return {
            f"{name} {metric}": entry["value"]
            for name, task in told["tasks"].items()
            for metric, entry in task["metrics"].items()
        }

    def _result(self, row: Row) -> RowResult:
        best, rates = self._best(row), self._comparison.rates_of(row)
        first = self._comparison.seeds_of(row)[0]
        if best is None:
            problem = self._cells.found.get(Cell(row, rates[0], first).key, {}).get("problem", "not run yet")
            return RowResult(row, problem=problem)
        cells = [Cell(row, best.lr, seed) for seed in self._comparison.seeds_of(row)]
        found = [figures for cell in cells if (figures := self._figures(cell)) is not None]
        scores = [self._tasks.found[cell.key] for cell in cells if cell.key in self._tasks.found]
        shares = [figures.event_share for figures in found if figures.event_share is not None]
        tried = {
            f"{rate:g}": figures.mean
            for rate in rates
            if rate is not None and (figures := self._figures(Cell(row, rate, first))) is not None
        }
        return RowResult(
            row=row,
            lr=best.lr,
            tried=tried,
            seeds=len(found),
            held_out={name: Spread.of([one.held_out[name] for one in found]) for name in found[0].held_out},
            mean=Spread.of([one.mean for one in found]),
            accuracy={name: Spread.of([one.accuracy[name] for one in found]) for name in found[0].accuracy},
            tasks={name: Spread.of([score[name] for score in scores]) for name in (scores[0] if scores else ())},
            figures=found[0],
            event_share=statistics.mean(shares) if shares else None,
        )

    def served(self) -> Made | None:
        """The best model of the method that is to be served, with the first seed; None where none is.

        Raises:
            TrainingError: that method has no model.
        """
        if self._comparison.serve is None:
            return None
        rows = [row for row in rows_of(self._comparison) if row.method == self._comparison.serve]
        found = [(figures.mean, cell) for row in rows if (cell := self._best(row)) and (figures := self._figures(cell))]
        if not found:
            raise TrainingError(f"serve = {self._comparison.serve}: it has no model; its runs failed")
        return self._workshop.make(min(found, key=lambda pair: pair[0])[1])

    def _tidy(self, method: str, rows: Sequence[Row]) -> None:
        """Removes what the runs of a method weigh, once all its cells are booked."""
        if method == self._comparison.serve or not self._comparison.methods[method].train:
            return
        for row in rows:
            for seed in self._comparison.seeds_of(row):
                for rate in self._comparison.rates_of(row):
                    self._workshop.forget(Cell(row, rate, seed))


def check_comparison(comparison: Comparison) -> int:
    """Resolves and checks the recipe of every cell.

    Returns:
        Their number.

    Raises:
        ConfigError: one cannot run.
    """
    workshop, count = Workshop(comparison), 0
    for row in rows_of(comparison):
        rates, seeds = comparison.rates_of(row), comparison.seeds_of(row)
        for rate in rates:
            workshop.recipe(Cell(row, rate, seeds[0]))
        count += len(rates) + len(seeds) - 1
    return count


def _same_recipe(comparison: Comparison, path: Path) -> None:
    """A directory holds one comparison: booked cells of another recipe would pass for this one's.

    More methods, formats, seeds or tasks may come in later; what all runs share may not change.
    """
    text = dump_yaml(comparison)
    if path.is_file():
        stated, mine = load_yaml(path), comparison.model_dump(mode="json")
        for name in ("recipe", "overrides", "task_limit"):
            if stated.get(name) != mine[name]:
                raise ConfigError(
                    f"out = {path.parent}: holds a comparison with other {name}; choose another directory"
                )
        for section in ("formats", "methods"):
            for name, entry in (stated.get(section) or {}).items():
                known = mine[section].get(name)
                if known is not None and _what_runs(known) != _what_runs(entry):
                    raise ConfigError(
                        f"out = {path.parent}: {section}.{name} was another one when its cells were made; give it "
                        "another name, or choose another directory"
                    )
    write_atomically(path, text.encode())


def _what_runs(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a method or format that a cell's key does not name."""
    return {name: value for name, value in entry.items() if name in ("overrides", "compress", "train")}
