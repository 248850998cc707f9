"""One layer's search as a study of optuna, kept in a journal on disk: the door to optuna.

What comes next is a function of the trials that are finished, so a search that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hcx.compress.rounding import DAMPINGS, KAPPAS, PLAIN, SHIFTS, TILTS, Knobs
from hcx.compress.text_reader import Losses
from hcx.errors import ConfigError, MissingExtra

Sampler = Literal["coordinate", "random", "tpe"]
WEIGHT_GRIDS: dict[str, tuple[float, ...]] = {"kappa": KAPPAS, "g0": SHIFTS, "g1": TILTS}
FEEDBACK_GRIDS: dict[str, tuple[float, ...]] = {"damping": DAMPINGS, **WEIGHT_GRIDS}
ACTIVATION_GRIDS: dict[str, tuple[float, ...]] = {"kappa_a": KAPPAS, "g_a": SHIFTS}
JOURNAL = "search.journal"


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    Attributes:
        knobs: of the layer.
        losses: by domain.
        rows: of each row of the text, in its order; empty where they are not known.
    """

    knobs: Knobs
    losses: Losses
    rows: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Mean over domains."""
        return sum(self.losses.values()) / len(self.losses)


def evaluations(grids: Mapping[str, Sequence[float]], rounds: int) -> int:
    """How many evaluations a layer takes: the start, and every grid point in every round (75 by default)."""
    return 1 + rounds * sum(len(grid) for grid in grids.values())


@dataclass(frozen=True)
class Acceptance:
    """When a trial takes the incumbent's place.

    Attributes:
        epsilon: its loss must be lower by more than this; ties keep the incumbent.
        slack: no domain's loss may rise by more than this.
        noise: its loss must be lower by so many standard errors of the difference, paired by row, where rows are known.
            The best of many settings on little text is else often the luckiest.
    """

    epsilon: float = 1e-12
    slack: float = 0.02
    noise: float = 0.0

    def floor(self, trial: Trial, incumbent: Trial) -> float:
        """By how much a trial must be better."""
        count = len(trial.rows)
        if not self.noise or count < 2 or len(incumbent.rows) != count:
            return self.epsilon
        changes = [mine - other for mine, other in zip(trial.rows, incumbent.rows, strict=True)]
        return max(self.epsilon, self.noise * statistics.stdev(changes) / math.sqrt(count))


STRICT = Acceptance()
"""Exact arithmetic: whatever is lower is better."""


def accepted(trials: Sequence[Trial], rule: Acceptance) -> list[Trial]:
    """The trials that became the incumbent, in order; the first is where the search began.

    Args:
        trials: in the order of evaluation.
        rule: see `Acceptance`.
    """
    best = [trials[0]]
    for trial in trials[1:]:
        incumbent = best[-1]
        if not math.isfinite(trial.loss) or trial.loss >= incumbent.loss - rule.floor(trial, incumbent):
            continue
        if any(loss > incumbent.losses[domain] + rule.slack for domain, loss in trial.losses.items()):
            continue
        best.append(trial)
    return best


def next_knobs(
    trials: Sequence[Trial],
    grids: Mapping[str, Sequence[float]],
    rounds: int,
    start: Knobs,
    rule: Acceptance,
) -> Knobs | None:
    """What coordinate descent evaluates after these trials; None when it is done.

    The winner of each axis is settled before the next axis begins.
    """
    if not trials:
        return start
    axes = [(name, grid) for _ in range(rounds) for name, grid in grids.items()]
    done = len(trials) - 1
    used = 1
    for name, grid in axes:
        if done < len(grid):
            incumbent = accepted(trials[:used], rule)[-1].knobs
            return replace(incumbent, **{name: grid[done]})
        done -= len(grid)
        used += len(grid)
    return None


def search_layer(
    name: str,
    loss: Callable[[Knobs], Losses],
    start: Knobs = PLAIN,
    grids: Mapping[str, Sequence[float]] = WEIGHT_GRIDS,
    rounds: int = 2,
    sampler: Sampler = "coordinate",
    rule: Acceptance = STRICT,
    directory: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    rows: Callable[[], Sequence[float]] | None = None,
) -> list[Trial]:
    """Searches the knobs of one layer; finished trials of an earlier, interrupted search are not evaluated again.

    Args:
        name: of the layer.
        loss: the task loss with the layer quantized like this; deterministic.
        start: evaluated first, and never left for something worse.
        grids: axis -> values, in the order of the descent.
        rounds: over all axes.
        sampler: `coordinate` descent, or as many evaluations of optuna's `random` or `tpe` sampler.
        rule: when a setting wins.
        directory: holds the journal; nothing is kept if not given.
        settings: what the losses depend on; a journal made with others is refused.
        seed: of the samplers.
        rows: the loss of each row of text at the last call of `loss`.

    Returns:
        Every trial, in the order of evaluation.

    Raises:
        MissingExtra: optuna is not installed.
        ConfigError: the journal belongs to a search with other settings.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise MissingExtra("optuna", "search", "the non-convex search") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers: dict[str, Any] = {
        "coordinate": lambda: optuna.samplers.RandomSampler(seed),
        "random": lambda: optuna.samplers.RandomSampler(seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
    }
    if sampler not in samplers:
        raise ConfigError(f"search.sampler = {sampler!r}; valid: {', '.join(samplers)}")
    storage = None
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(directory / JOURNAL))
        storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(
        storage=storage, study_name=name, sampler=samplers[sampler](), direction="minimize", load_if_exists=True
    )
    stated = json.dumps({**(settings or {}), "start": asdict(start), "grids": {k: list(v) for k, v in grids.items()},
                         "rounds": rounds, "sampler": sampler, "seed": seed, "rule": asdict(rule)},
                        sort_keys=True)  # fmt: skip
    if study.user_attrs.get("settings", stated) != stated:
        raise ConfigError(
            f"{directory}: holds a search of {name} with other settings, text or weights; "
            "remove that directory, or write to another --out"
        )
    study.set_user_attr("settings", stated)
    # Where the search starts need not be a point of the grid.
    choices = {axis: tuple(dict.fromkeys((*grid, getattr(start, axis)))) for axis, grid in grids.items()}
    distributions: dict[str, Any] = {
        axis: optuna.distributions.CategoricalDistribution(values) for axis, values in choices.items()
    }
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state == optuna.trial.TrialState.COMPLETE]
    finished.sort(key=lambda trial: trial.number)
    trials = [
        Trial(replace(start, **trial.params), trial.user_attrs["losses"], tuple(trial.user_attrs["rows"]))
        for trial in finished
    ]

    def read(knobs: Knobs) -> Trial:
        return Trial(knobs, dict(loss(knobs)), () if rows is None else tuple(rows()))

    budget = evaluations(grids, rounds)
    while len(trials) < budget:
        if sampler == "coordinate" or not trials:
            knobs = next_knobs(trials, grids, rounds, start, rule)
            assert knobs is not None
            found = read(knobs)
            # Added when it is finished: a kill in between leaves nothing half done.
            values = {axis: getattr(knobs, axis) for axis in grids}
            study.add_trial(
                optuna.trial.create_trial(
                    params=values,
                    distributions=distributions,
                    value=_told(found.loss),
                    user_attrs={"losses": dict(found.losses), "rows": list(found.rows)},
                )
            )
        else:
            asked = study.ask(distributions)
            knobs = replace(start, **asked.params)
            found = read(knobs)
            asked.set_user_attr("losses", dict(found.losses))
            asked.set_user_attr("rows", list(found.rows))
            study.tell(asked, _told(found.loss))
        trials.append(found)
    return trials


def _told(loss: float) -> float:
    # optuna refuses NaN; a model that overflows is simply as bad as can be.
    return loss if math.isfinite(loss) else 1e30
