"""Searching named fields of a training recipe under a budget of trials and time.

A trial is a whole run of `hcx train` with the fields overridden, once per seed; what it scored is one line of
`trials.jsonl`, so a search that was stopped goes on where it was, and a run that was stopped resumes as runs do.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from hcx.artifacts import find_file
from hcx.artifacts.manifest import write_atomically
from hcx.config import Config, dump_yaml, load_config
from hcx.errors import ConfigError, MissingExtra, TrainingError
from hcx.obs import get_logger
from hcx.recipe.checks import check_recipe
from hcx.recipe.processes import run_command
from hcx.recipe.train import load_train_recipe

log = get_logger(__name__)

TRIALS, BEST = "trials.jsonl", "best.yaml"
Value = bool | int | float | str


class SearchField(Config):
    """What a field may be: a list of values, or a range."""

    values: tuple[Value, ...] | None = None
    """The values to try."""
    low: float | int | None = None
    """Smallest value of a range."""
    high: float | int | None = None
    """Largest value of a range."""
    log: bool = False
    """Spread a range evenly over its logarithm."""
    integer: bool = False
    """Whole numbers of a range."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_range = self.low is not None and self.high is not None
        if (self.values is not None) == is_range or (self.low is None) != (self.high is None):
            raise ValueError("give either values: [...], or low and high")
        if self.values is not None and not self.values:
            raise ValueError("values is empty; name at least one")
        if is_range and not float(self.low or 0) < float(self.high or 0):
            raise ValueError(f"low = {self.low}, high = {self.high}; low must be below high")
        if self.log and not (self.low or 0) > 0:
            raise ValueError(f"log: true with low = {self.low}; a logarithm needs low above 0")
        return self

    @property
    def first(self) -> Value:
        """A value to check the recipe with."""
        if self.values is not None:
            return self.values[0]
        return int(self.low or 0) if self.integer else float(self.low or 0)


class TuneRecipe(Config):
    """A search over fields of a training recipe."""

    name: str
    """Names the search for people."""
    out: str
    """Directory of the search: trials, their runs, the picture."""
    recipe: str
    """The training recipe, a file or a shipped one."""
    overrides: tuple[str, ...] = ()
    """`key=value` for every run, such as `train.steps=500`."""
    search: dict[str, SearchField]
    """Dotted field -> what it may be, such as `regularise.period`."""
    sampler: Literal["grid", "tpe", "random"] = "tpe"
    """`grid`: every combination of values, in order; `tpe`: where earlier trials were good (Bergstra et al. 2011)."""
    trials: int = 20
    """Combinations at most."""
    max_minutes: float | None = None
    """No new trial after this time; no limit if not given."""
    seeds: tuple[int, ...] = (0,)
    """Values of the recipe's `seed`; a combination's score is the mean over them."""
    score: str = "mean"
    """What is made small at the end: the bits per byte of a language, or `mean` over all of them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.search:
            raise ValueError("search is empty; name at least one field, such as regularise.period")
        if not self.seeds or self.trials < 1:
            raise ValueError("seeds must hold at least one number, and trials must be at least 1")
        if self.sampler == "grid":
            ranges = [name for name, field in self.search.items() if field.values is None]
            if ranges:
                raise ValueError(f"sampler: grid needs values: [...], and {ranges[0]} is a range")
        if any(name in ("out", "seed") for name in self.search):
            raise ValueError("out and seed are set by the search itself")
        return self


@dataclass(frozen=True)
class TrialResult:
    """What a combination scored.

    Attributes:
        number: of the trial, from 0.
        values: field -> value.
        scores: one per seed; empty where a run failed.
        seconds: of all its runs.
        problem: why it failed, or None.
    """

    number: int
    values: dict[str, Value]
    scores: list[float]
    seconds: float
    problem: str | None = None

    @property
    def mean(self) -> float:
        """Mean score; infinite for a failed trial."""
        return sum(self.scores) / len(self.scores) if self.scores else math.inf

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; NaN for one."""
        if len(self.scores) < 2:
            return math.nan
        return math.sqrt(sum((score - self.mean) ** 2 for score in self.scores) / (len(self.scores) - 1))


Run = Callable[[Sequence[str]], Mapping[str, float]]
"""Overrides of a run -> bits per byte by language. Raises `TrainingError` for a run that failed by itself."""


def load_tune_recipe(path: str | Path) -> TuneRecipe:
    """Reads a search, and checks the training recipe with a value of every field.

    Raises:
        ConfigError: something does not fit, such as a field that the recipe does not have.
    """
    tune = load_config(TuneRecipe, path)
    fixed = [*tune.overrides, *(_override(name, field.first) for name, field in tune.search.items())]
    check_recipe(load_train_recipe(find_file(tune.recipe, "launch/train"), fixed))
    return tune


def search(tune: TuneRecipe, run: Run | None = None) -> list[TrialResult]:
    """Tries combinations until the budget is used; goes on where an earlier search in the same directory stopped.

    Args:
        tune: the search.
        run: does a run; `hcx train` in a process of its own if not given.

    Raises:
        ConfigError: the directory holds a search over other fields.
        TrainingError: every trial failed.
        MissingExtra: the sampler needs optuna, which is not installed.
    """
    run = run or train_run(tune)
    out = Path(tune.out)
    out.mkdir(parents=True, exist_ok=True)
    done = read_trials(out)
    if any(set(trial.values) != set(tune.search) for trial in done):
        raise ConfigError(
            f"out = {out}: holds trials over {', '.join(sorted(done[0].values))}; choose another directory"
        )
    write_atomically(out / "tune.yaml", dump_yaml(tune).encode())
    begun = time.monotonic()
    propose = _grid(tune, done) if tune.sampler == "grid" else _sampled(tune, done)
    for values in propose:
        if tune.max_minutes is not None and time.monotonic() - begun > 60 * tune.max_minutes:
            log.warning("the budget of %g minutes is used after %d trials", tune.max_minutes, len(done))
            break
        done.append(_trial(tune, len(done), values, run))
        # A line is whole or absent: written in one piece, and a torn last line is dropped when it is read.
        with (out / TRIALS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(done[-1])) + "\n")
        log.info("trial %d: %s: %.5g", done[-1].number, values, done[-1].mean)
    best = best_of(done)
    overrides = [_override(name, value) for name, value in best.values.items()]
    write_atomically(
        out / BEST, json.dumps({"overrides": overrides, "score": best.mean, "trial": best.number}).encode()
    )
    return done


def best_of(trials: Sequence[TrialResult]) -> TrialResult:
    """The trial with the smallest mean score.

    Raises:
        TrainingError: none has a score.
    """
    good = [trial for trial in trials if trial.scores]
    if not good:
        reason = trials[0].problem if trials else "no trial was made within the budget"
        raise TrainingError(f"no trial has a score; the first one: {reason}")
    return min(good, key=lambda trial: trial.mean)


def read_trials(out: Path) -> list[TrialResult]:
    """The trials of a directory, in order."""
    path = out / TRIALS
    if not path.is_file():
        return []
    found = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:
        found.append(TrialResult(**json.loads(line)))
    if lines[-1]:
        write_atomically(path, "".join(line + "\n" for line in lines[:-1]).encode())
    return found


def train_run(tune: TuneRecipe) -> Run:
    """`hcx train` in a process of its own: a run's process groups and kernels end with it."""

    def run(overrides: Sequence[str]) -> Mapping[str, float]:
        told = json.loads(run_command(["train", tune.recipe, *tune.overrides, *overrides, "--json"]))
        figures: Mapping[str, float] = told.get("bits_per_byte") or told.get("loss") or {}
        return figures

    return run


def _trial(tune: TuneRecipe, number: int, values: dict[str, Value], run: Run) -> TrialResult:
    start, scores = time.monotonic(), []
    try:
        for seed in tune.seeds:
            directory = Path(tune.out) / "runs" / f"{number:03d}-seed{seed}"
            overrides = [_override(name, value) for name, value in values.items()]
            scores.append(_score(tune, run([*overrides, f"seed={seed}", f"out={directory}"])))
    except TrainingError as error:
        log.warning("trial %d failed: %s", number, error)
        return TrialResult(number, values, [], time.monotonic() - start, str(error))
    return TrialResult(number, values, scores, time.monotonic() - start)


def _score(tune: TuneRecipe, figures: Mapping[str, float]) -> float:
    if not figures:
        raise TrainingError("the run scored no held-out text; set train.validate_every and validation in its recipe")
    if tune.score == "mean":
        return sum(figures.values()) / len(figures)
    if tune.score not in figures:
        raise ConfigError(f"score = {tune.score!r}; the run scores: {', '.join(sorted(figures))}, or mean")
    return figures[tune.score]


def _grid(tune: TuneRecipe, done: Sequence[TrialResult]) -> Iterator[dict[str, Value]]:
    seen = [trial.values for trial in done]
    names = list(tune.search)
    combinations = itertools.product(*(tune.search[name].values or () for name in names))
    for combination in itertools.islice(combinations, tune.trials):
        values = dict(zip(names, combination, strict=True))
        if values not in seen:
            yield values


def _sampled(tune: TuneRecipe, done: list[TrialResult]) -> Iterator[dict[str, Value]]:
    try:
        import optuna
    except ModuleNotFoundError:
        raise MissingExtra("optuna", "search", f"sampler: {tune.sampler}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {name: _distribution(optuna, field) for name, field in tune.search.items()}
    kind = optuna.samplers.TPESampler if tune.sampler == "tpe" else optuna.samplers.RandomSampler
    # From the number of trials done too: a search that goes on must not draw what it drew at its start.
    study = optuna.create_study(direction="minimize", sampler=kind(seed=len(done)))
    told = 0

    def tell() -> None:
        nonlocal told
        for trial in done[told:]:
            state = optuna.trial.TrialState.COMPLETE if trial.scores else optuna.trial.TrialState.FAIL
            value = trial.mean if trial.scores else None
            study.add_trial(
                optuna.trial.create_trial(state=state, params=trial.values, distributions=spaces, value=value)
            )
        told = len(done)

    while len(done) < tune.trials:
        tell()
        asked = study.ask(spaces)
        values = dict(asked.params)
        # What was asked for comes back through `tell`, also after a restart.
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
        yield values


def _distribution(optuna: Any, field: SearchField) -> Any:
    if field.values is not None:
        return optuna.distributions.CategoricalDistribution(field.values)
    low, high = field.low or 0, field.high or 0
    if field.integer:
        return optuna.distributions.IntDistribution(int(low), int(high), log=field.log)
    return optuna.distributions.FloatDistribution(float(low), float(high), log=field.log)


def _override(name: str, value: Value) -> str:
    return f"{name}={json.dumps(value)}"
