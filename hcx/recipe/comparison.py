"""A comparison of methods on one task: what is compared, as a recipe, and the runs that it means.

A cell is one method in one format with one learning rate and one seed. Cells that differ only in how their finished
model is compressed share a run: it is trained once.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from hcx.compress import CompressPlan
from hcx.config import Config, load_config
from hcx.errors import did_you_mean

Value = bool | int | float | str


class Need(Config):
    """Something that must be there before the first run, and the command that makes it."""

    path: str
    """A file or directory; nothing is done where it exists."""
    command: tuple[str, ...]
    """Words of an `hcx` command, such as `[data, fetch, smollm2, --out, data/smollm2]`."""


class Format(Config):
    """What every method is to end in, such as 2 bits."""

    overrides: tuple[str, ...] = ()
    """`key=value` for the training recipe."""
    compress: CompressPlan | None = None
    """For methods that compress before or after training."""
    seeds: tuple[int, ...] | None = None
    """Other seeds than the comparison's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seeds is not None and not self.seeds:
            raise ValueError("seeds is empty; leave it out, or name at least one")
        return self


class Method(Config):
    """A way to get from the recipe to a compressed model."""

    overrides: tuple[str, ...] = ()
    """`key=value` for the training recipe."""
    vary: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    """Dotted field -> values; every combination is a row of the table."""
    compress: Literal["before", "after"] | None = None
    """When the format's plan is applied: to the model that training starts from, or to the one that it wrote."""
    train: bool = True
    """False: the compressed start is scored as it is (with `compress: before`)."""
    learning_rates: tuple[float, ...] = ()
    """Tried with the first seed; the one with the lowest held-out figure is run with the others. The recipe's if
    empty."""
    formats: tuple[str, ...] | None = None
    """The formats it is run in; all if not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.train and (self.compress != "before" or self.vary or self.learning_rates or self.overrides):
            raise ValueError("train: false goes with compress: before and nothing else: nothing is trained")
        if any(name in ("out", "seed", "optim.lr", "init_from") for name in self.vary):
            raise ValueError("out, seed, optim.lr and init_from are the comparison's; give learning_rates and seeds")
        return self


class Comparison(Config):
    """Methods on one task, in several formats, over seeds."""

    name: str
    """Names the comparison for people."""
    out: str
    """Directory of the comparison: runs, the ledger of finished cells, tables, the picture."""
    recipe: str
    """The training recipe, a file or a shipped one."""
    overrides: tuple[str, ...] = ()
    """`key=value` for every run."""
    needs: tuple[Need, ...] = ()
    """Made first, in order, where they are missing."""
    formats: dict[str, Format]
    """Name -> what the methods end in."""
    methods: dict[str, Method]
    """Name -> how they get there."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Values of the recipe's `seed`."""
    tasks: tuple[str, ...] = ()
    """Tasks of `hcx eval` that every row's models are scored on, beside held-out loss."""
    task_limit: int | None = None
    """Only the first items of each task."""
    serve: str | None = None
    """A method whose first model is served at the end and asked for a completion, in a page with its run; none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.formats or not self.methods or not self.seeds:
            raise ValueError("formats, methods and seeds must each name at least one")
        for name, method in self.methods.items():
            for chosen in method.formats or ():
                if chosen not in self.formats:
                    raise ValueError(f"methods.{name}.formats: {chosen!r}: {did_you_mean(chosen, self.formats)}")
            if method.compress is not None:
                for chosen in method.formats or self.formats:
                    if self.formats[chosen].compress is None:
                        raise ValueError(f"methods.{name}: compresses, and formats.{chosen} has no compress plan")
        if self.serve is not None and self.serve not in self.methods:
            raise ValueError(f"serve = {self.serve!r}: {did_you_mean(self.serve, self.methods)}")
        return self

    def seeds_of(self, row: Row) -> tuple[int, ...]:
        """The seeds that a row is run with; one where nothing is trained, since nothing is drawn."""
        seeds = self.formats[row.format].seeds or self.seeds
        return seeds if self.methods[row.method].train else seeds[:1]

    def rates_of(self, row: Row) -> tuple[float | None, ...]:
        """The learning rates that a row is tried with; None: the recipe's."""
        return self.methods[row.method].learning_rates or (None,)


@dataclass(frozen=True)
class Row:
    """A row of the table: a method in a format, with values of what it varies."""

    method: str
    format: str
    values: tuple[tuple[str, Value], ...] = ()

    @property
    def label(self) -> str:
        """The method, and the last part of each varied field with its value."""
        return " ".join([self.method, *(f"{name.rpartition('.')[2]}={value}" for name, value in self.values)])


@dataclass(frozen=True)
class Cell:
    """One model: a row with a learning rate (None: the recipe's) and a seed."""

    row: Row
    lr: float | None
    seed: int

    @property
    def key(self) -> str:
        """Names the cell in ledgers."""
        named = {"method": self.row.method, "format": self.row.format, "values": dict(self.row.values)}
        return json.dumps({**named, "lr": self.lr, "seed": self.seed}, ensure_ascii=False, sort_keys=True)


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Reads a comparison, with `key=value` overrides applied.

    Raises:
        ConfigError: naming the key path, the value and what is allowed.
    """
    return load_config(Comparison, path, overrides)


def rows_of(comparison: Comparison) -> Iterator[Row]:
    """Every row, method by method; formats of one training follow each other."""
    for name, method in comparison.methods.items():
        for combination in itertools.product(*method.vary.values()):
            for chosen in method.formats or comparison.formats:
                yield Row(name, chosen, tuple(zip(method.vary, combination, strict=True)))


def depends_on_format(comparison: Comparison, row: Row) -> bool:
    """Whether training itself differs between formats; where it does not, formats share one run."""
    return comparison.methods[row.method].compress == "before" or bool(comparison.formats[row.format].overrides)


def run_name(comparison: Comparison, cell: Cell) -> str:
    """The folder of a cell's run below `OUT/runs`; equal for cells that share one."""
    parts = [cell.row.method]
    if depends_on_format(comparison, cell.row):
        parts.append(cell.row.format)
    parts += [f"{name.rpartition('.')[2]}-{value}" for name, value in cell.row.values]
    if cell.lr is not None:
        parts.append(f"lr-{cell.lr:g}")
    return folder_name(*parts, f"seed-{cell.seed}")


def folder_name(*parts: str) -> str:
    """A folder's name out of names for people."""
    return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-") for part in parts)


def overrides_of(comparison: Comparison, cell: Cell, places: Mapping[str, str]) -> list[str]:
    """What the training recipe is changed by, the later over the earlier.

    Args:
        comparison: the recipe.
        cell: which model.
        places: `out`, and `init_from` where training starts from a compressed model.
    """
    row = cell.row
    changes = [
        *comparison.overrides,
        *comparison.formats[row.format].overrides,
        *comparison.methods[row.method].overrides,
        *(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in row.values),
        f"seed={cell.seed}",
        *(f"{name}={value}" for name, value in places.items()),
    ]
    return [*changes, f"optim.lr={cell.lr!r}"] if cell.lr is not None else changes
