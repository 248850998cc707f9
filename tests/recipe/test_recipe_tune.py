"""A search tries what it says, keeps what it learnt, finds a known minimum, and draws it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hcx.artifacts import find_resource, resource_names
from hcx.cli.main import main
from hcx.config.decode import decode
from hcx.data import ShardSet
from hcx.errors import ConfigError, TrainingError
from hcx.recipe.tune import TRIALS, TuneRecipe, best_of, load_tune_recipe, read_trials, search
from hcx.report.surface import plot_search
from hcx.testing.shards import tiny_shards

BASE: dict[str, Any] = {
    "name": "s",
    "recipe": "launch/train/demo.yaml",
    "search": {"regularise.period": {"values": [1, 4, 16]}, "optim.lr": {"values": [0.001, 0.01]}},
    "sampler": "grid",
}


def tune_of(out: Path, **changes: Any) -> TuneRecipe:
    return decode(TuneRecipe, {**BASE, "out": str(out), **changes}, "here")


class Runs:
    """Scores a known function instead of training; remembers what it was asked for."""

    def __init__(self, fails: float | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self._fails = fails

    def __call__(self, overrides: Sequence[str]) -> Mapping[str, float]:
        pairs = [text.split("=", 1) for text in overrides]
        values = {key: value if key == "out" else json.loads(value) for key, value in pairs}
        self.asked.append(values)
        if self._fails is not None and values.get("optim.lr") == self._fails:
            raise TrainingError("it diverged")
        period = values.get("regularise.period", 4)
        distance = (period - 4) ** 2 / 100 + abs(values.get("optim.lr", 0.01) - 0.01)
        return {"ko": 2.0 + distance + 0.01 * values["seed"], "en": 1.0 + distance}


def test_a_grid_makes_every_combination_with_every_seed(tmp_path: Path) -> None:
    runs = Runs()
    trials = search(tune_of(tmp_path, seeds=[0, 1, 2]), runs)
    assert len(trials) == 6
    assert len(runs.asked) == 18
    assert len({values["out"] for values in runs.asked}) == 18
    best = best_of(trials)
    assert best.values == {"regularise.period": 4, "optim.lr": 0.01}
    assert best.mean == pytest.approx(1.505)
    # Means over both languages: 0, 0.005 and 0.01 for the seeds.
    assert best.spread == pytest.approx(0.005)
    stated = json.loads((tmp_path / "best.yaml").read_text(encoding="utf-8"))
    assert stated["overrides"] == ["regularise.period=4", "optim.lr=0.01"]
    assert search(tune_of(tmp_path / "ko", score="ko"), Runs())[0].mean == pytest.approx(2.0 + 0.09 + 0.009)


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    runs = Runs()

    def some(overrides: Sequence[str]) -> Mapping[str, float]:
        if len(runs.asked) == 4:
            raise Stopped
        return runs(overrides)

    with pytest.raises(Stopped):
        search(tune_of(tmp_path), some)
    # A line that was cut short is no trial.
    with (tmp_path / TRIALS).open("a", encoding="utf-8") as file:
        file.write('{"number": 4, "val')
    assert len(read_trials(tmp_path)) == 4
    assert len(search(tune_of(tmp_path), runs)) == 6
    assert len(runs.asked) == 6
    assert len(search(tune_of(tmp_path), runs)) == len(runs.asked) == 6
    with pytest.raises(ConfigError, match="holds trials over"):
        search(tune_of(tmp_path, search={"optim.lr": {"values": [0.1]}}), runs)


def test_a_failed_trial_is_booked_and_does_not_win(tmp_path: Path) -> None:
    trials = search(tune_of(tmp_path), Runs(fails=0.01))
    assert sum(trial.problem is not None for trial in trials) == 3
    assert best_of(trials).values["optim.lr"] == 0.001
    with pytest.raises(TrainingError, match="no trial has a score; the first one: it diverged"):
        search(tune_of(tmp_path / "none", search={"optim.lr": {"values": [0.01]}}), Runs(fails=0.01))


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_samplers_keep_to_the_budget_and_go_on(tmp_path: Path, sampler: str) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    fields = {
        "optim.lr": {"low": 1e-4, "high": 0.1, "log": True},
        "regularise.period": {"low": 1, "high": 64, "integer": True},
    }
    runs = Runs()
    search(tune_of(tmp_path, sampler=sampler, search=fields, trials=5), runs)
    trials = search(tune_of(tmp_path, sampler=sampler, search=fields, trials=25), runs)
    assert len(trials) == len(runs.asked) == 25
    for values in runs.asked:
        assert 1e-4 <= values["optim.lr"] <= 0.1
        assert values["regularise.period"] in range(1, 65)
    assert len({values["optim.lr"] for values in runs.asked}) == 25
    best = best_of(trials)
    assert abs(best.values["regularise.period"] - 4) <= 6  # type: ignore[operator]


def test_the_time_budget_ends_a_search(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no trial was made within the budget"):
        search(tune_of(tmp_path, max_minutes=-1.0), Runs())


def test_curves_and_surfaces_are_drawn(tmp_path: Path) -> None:
    trials = search(tune_of(tmp_path, seeds=[0, 1]), Runs())
    plot_search(trials, tmp_path / "two.svg", "bits per byte")
    text = (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert all(word in text for word in ("regularise.period", "optim.lr", "bits per byte", "1.502", "\u00b1"))
    numbers = tune_of(tmp_path / "numbers", search={"regularise.period": {"values": [1, 4, 16]}})
    plot_search(search(numbers, Runs()), tmp_path / "one.svg", "bits per byte")
    assert "regularise.period" in (tmp_path / "one.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {}}, "search is empty"),
        ({"search": {"optim.lr": {"low": 1.0, "high": 0.1}}}, "low must be below high"),
        ({"search": {"optim.lr": {"low": 0.0, "high": 0.1, "log": True}}}, "needs low above 0"),
        ({"search": {"optim.lr": {"low": 0.1, "high": 1.0}}}, "grid needs values"),
        ({"search": {"seed": {"values": [1]}}}, "set by the search itself"),
        ({"sampler": "cmaes"}, "sampler"),
    ],
)
def test_a_search_that_means_nothing_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tune_of(tmp_path, **changes)
    assert message in str(error.value)


def test_a_field_that_the_recipe_lacks_is_told_before_the_first_run(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    wrong = {**BASE, "out": str(tmp_path), "search": {"regularise.perod": {"values": [1]}}}
    path.write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"regularise\.perod"):
        load_tune_recipe(path)


@pytest.mark.parametrize("name", resource_names("launch/tune"))
def test_every_shipped_search_loads_with_its_recipe(name: str) -> None:
    load_tune_recipe(find_resource(name))


def test_the_command_trains_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tiny_shards(tmp_path / "shards").directory
    sizes = ["hidden_size=32", "intermediate_size=48", "num_layers=1", "num_heads=2", "num_kv_heads=1"]
    values = {
        **BASE,
        "out": str(tmp_path / "out"),
        "overrides": [
            f"data.shards={shards}",
            f"model.vocab_size={ShardSet.open(shards).vocab_size}",
            *(f"model.{size}" for size in sizes),
            *("data.seq_len=32", "train.steps=3", "train.global_batch=2", "train.micro_batch=2"),
            *("optim.schedule.warmup_steps=1", "validation.max_documents=1", "regularise={warmup_steps: 0}"),
        ],
        "search": {"regularise.period": {"values": [1, 3]}},
    }
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(path), "--dry-run"])
    assert ended.value.code == 0
    assert "at most 20 trials of 1 seed(s): legal" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(path), "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert [trial["values"]["regularise.period"] for trial in told["trials"]] == [1, 3]
    assert told["score"] == min(trial["scores"][0] for trial in told["trials"])
    assert (tmp_path / "out" / "surface.svg").is_file()
    assert (tmp_path / "out" / "runs" / "000-seed0" / "model" / "bcq.safetensors").is_file()
