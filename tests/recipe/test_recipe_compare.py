"""A comparison trains each model once, chooses rates, counts exactly, goes on after a stop, and says what it found."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hcx.artifacts import find_resource, resource_names
from hcx.cli.main import main
from hcx.config.decode import decode
from hcx.errors import ConfigError, TrainingError
from hcx.model.load import load_model
from hcx.obs import read_jsonl
from hcx.recipe.compare import CELLS, RECIPE, Ledger, Run, check_comparison
from hcx.recipe.comparison import Cell, Comparison, Row, load_comparison, rows_of, run_name
from hcx.recipe.comparison_cell import Figures, Made, Workshop, optimizer_figures, score, weight_bytes
from hcx.recipe.processes import Commands
from hcx.report.comparison import table_rows, write_comparison
from hcx.testing.commands import hcx, small_run
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import TINY_TEXT, tiny_model_directory
from hcx.train import latest_checkpoint

RATES = [0.001, 0.02]
METHODS: dict[str, Any] = {
    "compressed only": {"train": False, "compress": "before"},
    "scales": {"compress": "before", "overrides": ["adapter={kind: alphatuning}"], "learning_rates": RATES},
    "low rank over codes": {"compress": "before", "overrides": ["adapter={kind: lora, rank: 2}"]},
    "low rank, then codes": {"compress": "after", "overrides": ["adapter={kind: lora, rank: 2}"]},
    "all weights, then codes": {"compress": "after"},
}


def in_this_process(words: Sequence[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = hcx(*words)
    if code != 0:
        raise TrainingError(f"hcx {words[0]} ended with {code}")
    return printed.getvalue()


class Counting:
    """Counts commands on their way."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.words: list[list[str]] = []
        self._left = stop_after

    def __call__(self, words: Sequence[str]) -> str:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
        self.words.append(list(words))
        return in_this_process(words)


def comparison_of(out: Path, recipe: Path, **changes: Any) -> Comparison:
    values = {
        "name": "tiny",
        "out": str(out),
        "recipe": str(recipe),
        "formats": {f"{bits} bits": {"compress": {"default": {"bits": bits, "group_size": 128}}} for bits in (2, 3)},
        "methods": METHODS,
        "seeds": [0, 1],
        **changes,
    }
    return decode(Comparison, values, "here")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compare")
    tiny_model_directory(directory / "full")
    rows = [{"prompt": TINY_TEXT[n % 5][: 8 + n], "response": TINY_TEXT[(n + 1) % 5][: 3 + 2 * n]} for n in range(24)]
    chat = directory / "chat.jsonl"
    chat.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    values = {
        "name": "tiny",
        "out": str(directory / "unused"),
        "init_from": str(directory / "full"),
        "data": {"kind": "chat", "sources": [{"path": str(chat)}], "seq_len": 160, "validation_fraction": 0.2},
        "train": {"steps": 3, "global_batch": 512, "micro_batch": 256, "checkpoint_every": 0},
        "optim": {"kind": "adamw", "lr": 0.01, "schedule": {"warmup_steps": 1}},
    }
    path = directory / "tiny.yaml"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> tuple[Comparison, Counting, Run]:
    comparison = comparison_of(recipe.parent / "finished", recipe)
    commands = Counting()
    run = Run(comparison, commands)
    run.run()
    return comparison, commands, run


def test_formats_of_one_training_share_its_run(finished: tuple[Comparison, Counting, Run]) -> None:
    comparison, commands, _ = finished
    trained = [words for words in commands.words if words[0] == "train"]
    # Scales: 2 rates and 1 further seed, of each of 2 formats; low rank over codes: 2 seeds of each; the others once.
    assert len(trained) == 2 * 3 + 2 * 2 + 2 + 2
    assert len({next(word for word in words if word.startswith("out=")) for words in trained}) == len(trained)
    assert len(list(rows_of(comparison))) == 10
    assert check_comparison(comparison) == 2 * (1 + 3 + 2 + 2 + 2)


def test_what_a_method_trains_is_counted_exactly(finished: tuple[Comparison, Counting, Run], recipe: Path) -> None:
    _, _, run = finished
    found = {(result.row.method, result.row.format): result for result in run.results()}
    assert all(result.problem is None for result in found.values())
    out = recipe.parent / "finished"
    task = next((out / "runs").glob("scales_2-bits_*seed-0")) / "adapter" / "task.safetensors"
    numbers = sum(tensor.numel() for tensor in load_file(task).values())
    full = sum(tensor.numel() for tensor in load_file(recipe.parent / "full" / "model.safetensors").values())
    low = next((out / "runs").glob("low-rank-over-codes_2-bits*")) / "adapter" / "adapter_model.safetensors"
    expected = {
        "compressed only": 0,
        "scales": numbers,
        "low rank over codes": sum(tensor.numel() for tensor in load_file(low).values()),
        "all weights, then codes": full,
    }
    for method, count in expected.items():
        figures = found[method, "2 bits"].figures
        assert figures is not None
        assert figures.trained_numbers == count
        assert figures.optimizer_bytes == 8 * count  # two moments of AdamW, fp32
    scales = found["scales", "2 bits"].figures
    assert scales is not None
    assert scales.task_bytes == task.stat().st_size
    assert scales.model_bytes == scales.task_bytes + weight_bytes(out / "bases" / "2-bits")
    after = found["all weights, then codes", "3 bits"].figures
    assert after is not None
    assert after.task_bytes == after.model_bytes > scales.task_bytes
    # Models are removed when a method is done; what tells of them stays.
    assert not list((out / "runs").glob("*/model")) + list((out / "runs").glob("*/checkpoints"))


def test_the_better_rate_of_the_first_seed_is_run_with_the_others(finished: tuple[Comparison, Counting, Run]) -> None:
    _, _, run = finished
    (result,) = (r for r in run.results() if (r.row.method, r.row.format) == ("scales", "2 bits"))
    assert result.tried is not None
    assert f"{result.lr:g}" == min(result.tried, key=lambda rate: result.tried[rate])  # type: ignore[index]
    assert result.seeds == 2
    booked = Ledger(Path(run._comparison.out) / CELLS).found
    seeds = [json.loads(key)["seed"] for key in booked if json.loads(key)["method"] == "scales"]
    assert (seeds.count(0), seeds.count(1)) == (4, 2)


def test_a_stopped_comparison_goes_on_and_ends_in_the_same_figures(
    finished: tuple[Comparison, Counting, Run], recipe: Path, tmp_path: Path
) -> None:
    chosen = {name: METHODS[name] for name in ("compressed only", "low rank, then codes")}
    comparison = comparison_of(tmp_path / "out", recipe, methods=chosen)
    with pytest.raises(KeyboardInterrupt):
        Run(comparison, Counting(stop_after=1)).run()
    cells = tmp_path / "out" / CELLS
    assert len(cells.read_text(encoding="utf-8").splitlines()) == 4
    with cells.open("a", encoding="utf-8") as file:
        file.write('{"cell": "cut sh')
    again = Counting()
    found = Run(comparison, again).run()
    assert len(again.words) == 1
    done = Counting()
    assert len(Run(comparison, done).run()) == 4
    assert done.words == []
    before = {result.row: result for result in finished[2].results()}
    for result in found:
        assert result.mean == before[result.row].mean


def test_runs_beside_each_other_end_in_the_same_figures(
    finished: tuple[Comparison, Counting, Run], recipe: Path, tmp_path: Path
) -> None:
    chosen = {name: METHODS[name] for name in ("compressed only", "low rank, then codes")}
    run = Run(comparison_of(tmp_path / "out", recipe, methods=chosen), jobs=2)
    found = run.run()
    before = {result.row: result for result in finished[2].results()}
    assert [result.mean for result in found] == [before[result.row].mean for result in found]
    assert not list((tmp_path / "out" / "runs").glob("*/model"))


class Met(Workshop):
    """Trains nothing, but two runs must be here at once."""

    def __init__(self, comparison: Comparison, fails: str) -> None:
        super().__init__(comparison)
        self.trained: list[str] = []
        self._fails, self._both = fails, threading.Barrier(2, timeout=60)

    def prepare(self, cell: Cell) -> None:
        pass

    def train(self, cell: Cell) -> None:
        name = self.run_of(cell).name
        if name not in self.trained:
            self.trained.append(name)
            self._both.wait()
        if cell.row.method == self._fails:
            raise TrainingError("it diverged")

    def make(self, cell: Cell) -> Made:
        return Made(None, Path())

    def measure(self, cell: Cell, made: Made) -> Figures:
        return Figures({"ko": 1.0}, "bits_per_byte", {"ko": 0.5}, 7, 56, 28, 100, None, 1)


def test_the_first_seed_of_every_method_is_trained_first_and_a_shared_run_once(recipe: Path, tmp_path: Path) -> None:
    chosen = {
        name: METHODS[name] for name in ("low rank, then codes", "low rank over codes", "all weights, then codes")
    }
    comparison = comparison_of(tmp_path, recipe, methods=chosen)
    met = Met(comparison, fails="low rank over codes")
    found = Run(comparison, workshop=met, jobs=2).run()
    assert sorted(name.rpartition("_")[2] for name in met.trained[:4]) == ["seed-0"] * 4
    assert len(met.trained) == len(set(met.trained)) == 6  # the failed one has no second seed
    assert [result.problem for result in found] == [None, None, "it diverged", "it diverged", None, None]


def test_a_stopped_command_saves_and_no_other_starts(recipe: Path, tmp_path: Path) -> None:
    commands, told = Commands(threads=1), []

    def train() -> None:
        try:
            commands(["train", str(recipe), f"out={tmp_path / 'run'}", "train.steps=100000"])
        except KeyboardInterrupt as error:
            told.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and "train/loss" in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    commands.stop()
    thread.join(timeout=60)
    assert len(told) == 1
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is not None
    with pytest.raises(KeyboardInterrupt):
        commands(["--help"])


def test_scores_are_those_of_training_itself(recipe: Path, tmp_path: Path) -> None:
    assert hcx("train", recipe, f"out={tmp_path / 'run'}", "train.validate_every=3") == 0
    logged = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "validation/loss/chat" in row]
    from hcx.recipe import load_train_recipe

    figures, unit, accuracy = score(load_train_recipe(recipe), load_model(tmp_path / "run" / "model"))
    assert unit == "loss"
    assert figures["chat"] == pytest.approx(logged[-1]["validation/loss/chat"], rel=1e-5)
    assert 0 <= accuracy["chat"] <= 1
    trained, state = optimizer_figures(tmp_path / "run")
    assert state == 8 * trained > 0


def test_a_period_is_swept_beside_one_event_at_the_end_and_straight_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(tiny_shards(tmp_path / "shards").directory)
    section = "{default: {kind: %s}, warmup_steps: 0}"
    values = {
        "name": "periods",
        "out": str(tmp_path / "out"),
        "recipe": "launch/train/demo.yaml",
        "overrides": [word for word in small_run(shards, tmp_path) if not word.startswith("out=")],
        "formats": {
            "2 bits": {"overrides": ["regularise=" + section % "bcq, bits: 2, group_size: 16"]},
            "pruned": {"overrides": ["regularise=" + section % "prune, fraction: 0.8"]},
        },
        "methods": {
            "once": {"overrides": ["regularise.period=6"]},
            "straight-through": {"overrides": ["regularise.method=straight_through"], "formats": ["2 bits"]},
            "every": {"vary": {"regularise.period": [1, 3]}},
        },
        "seeds": [0],
        "serve": "every",
    }
    comparison = decode(Comparison, values, "here")
    run = Run(comparison, in_this_process)
    results = run.run()
    assert [result.problem for result in results] == [None] * 7
    shares = {(result.row.label, result.row.format): result.event_share for result in results}
    assert shares["every period=1", "2 bits"] is not None
    assert shares["every period=1", "2 bits"] > shares["every period=3", "2 bits"] > 0  # type: ignore[operator]
    write_comparison(results, tmp_path, "periods")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.count("| pruned |") == 3
    assert table.count(" *") >= 2
    svg = (tmp_path / "comparison.svg").read_text(encoding="utf-8")
    assert all(word in svg for word in ("straight-through", "regularise.period", "lowest", "pruned"))
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        assert [row["regularise.period"] for row in csv.DictReader(file)] == ["", "", "", "1", "1", "3", "3"]
    told = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert told["rows"][0]["mean"]["deviation"] is None  # one seed
    # The best model of the method that is served stays; those of the others do not.
    served = run.served()
    assert served is not None
    best = min(results[3:], key=lambda result: result.mean.mean)  # type: ignore[union-attr]
    assert dict(best.row.values)["regularise.period"] == int(served.model.parent.name.split("period-")[1].split("_")[0])
    assert served.model.is_dir()
    assert not list((tmp_path / "out" / "runs").glob("once*/model"))
    # The command makes nothing again: it writes the tables, serves that model, and writes a page over its run.
    path = tmp_path / "periods.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert hcx("bench", "methods", path, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 7
    serving = json.loads((tmp_path / "out" / "serving" / "serving.json").read_text(encoding="utf-8"))
    assert serving["model"] == served.model.parent.name
    assert serving["requests"][0]["tokens"] > 0
    page = (tmp_path / "out" / "report" / "index.html").read_text(encoding="utf-8")
    assert "every period=3" in page  # the search
    assert "파일을 저장하려면" in page  # the served answer


class Known(Workshop):
    """Knows the figure of every cell without training."""

    def __init__(self, comparison: Comparison, fails: str = "") -> None:
        super().__init__(comparison)
        self.made: list[Cell] = []
        self._fails = fails

    def make(self, cell: Cell) -> Made:
        self.made.append(cell)
        if cell.row.method == self._fails:
            raise TrainingError("it diverged")
        return Made(None, Path())

    def measure(self, cell: Cell, made: Made) -> Figures:
        value = 2.0 + 0.1 * cell.seed + abs((cell.lr or 0.02) - 0.02)
        return Figures(
            {"ko": value, "en": value - 1}, "bits_per_byte", {"ko": 0.5, "en": 0.25}, 7, 56, 28, 100, None, 1
        )


def test_a_failed_cell_is_told_and_tried_again(recipe: Path, tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, recipe)
    failed = [r for r in Run(comparison, workshop=Known(comparison, "scales")).run() if r.problem is not None]
    assert [(result.row.method, result.problem) for result in failed] == [("scales", "it diverged")] * 2
    assert "failed: it diverged" in "".join(cell for row in table_rows(failed) for cell in row)
    known = Known(comparison)
    assert all(result.problem is None for result in Run(comparison, workshop=known).run())
    assert {cell.row.method for cell in known.made} == {"scales"}
    rates = {"two": METHODS["scales"], "three": {**METHODS["scales"], "learning_rates": [1, 0.02, 0.003]}}
    wider = comparison_of(tmp_path / "wider", recipe, methods=rates)
    shown = table_rows(Run(wider, workshop=Known(wider)).run())
    assert [cells[6] for cells in shown] == ["0.02 (edge)", "0.02 (edge)", "0.02", "0.02"]
    spread = next(r for r in Run(comparison, workshop=known).results() if r.row.method == "scales").mean
    assert spread is not None
    assert (spread.mean, spread.low, spread.high) == pytest.approx((1.55, 1.5, 1.6))
    assert spread.deviation == pytest.approx(0.1 / 2**0.5)


def test_tasks_are_scored_once_per_model_with_its_adapter(recipe: Path, tmp_path: Path) -> None:
    class Adapted(Known):
        def make(self, cell: Cell) -> Made:
            return Made(None, Path("base"), Path(f"adapter-{cell.seed}"))

    asked: list[list[str]] = []

    def command(words: Sequence[str]) -> str:
        asked.append(list(words))
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        value = 40.0 + 2 * len(asked)
        told = {"tasks": {"translate": {"metrics": {"chrf++": {"value": value}}}}}
        (out / "results.json").write_text(json.dumps(told), encoding="utf-8")
        return ""

    scales = {"scales": METHODS["scales"]}
    comparison = comparison_of(tmp_path, recipe, methods=scales, tasks=["translate"], task_limit=5)
    results = Run(comparison, command, Adapted(comparison)).run()
    # Two formats, two seeds, at the chosen rate only.
    assert len(asked) == 4
    assert asked[0][:4] == ["eval", "base", "--tasks", "translate"]
    assert asked[1][asked[1].index("--adapter") + 1] == "adapter-1"
    assert asked[0][-2:] == ["--limit", "5"]
    found = results[0].tasks
    assert found is not None
    assert (found["translate chrf++"].mean, found["translate chrf++"].low) == (43.0, 42.0)
    assert results[0].lr == 0.02
    Run(comparison, command, Adapted(comparison)).run()
    assert len(asked) == 4


def test_needs_are_made_once_in_order(recipe: Path, tmp_path: Path) -> None:
    needs = [{"path": str(tmp_path / name), "command": [name, "--out"]} for name in ("first", "second")]
    asked: list[str] = []

    def command(words: Sequence[str]) -> str:
        asked.append(words[0])
        (tmp_path / words[0]).touch()
        return ""

    comparison = comparison_of(tmp_path / "out", recipe, needs=needs)
    Workshop(comparison, command).meet_needs()
    Workshop(comparison, command).meet_needs()
    assert asked == ["first", "second"]
    (tmp_path / "second").unlink()
    with pytest.raises(TrainingError, match="is still not there after hcx second"):
        Workshop(comparison, lambda words: "").meet_needs()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"a": {"compress": "after", "formats": ["2 bit"]}}}, "did you mean '2 bits'?"),
        ({"methods": {"a": {"train": False}}}, "train: false goes with compress: before"),
        ({"methods": {"a": {"compress": "after"}}, "formats": {"x": {}}}, "formats.x has no compress plan"),
        ({"methods": {"a": {"vary": {"seed": [1]}}}}, "are the comparison's"),
        ({"methods": {}}, "must each name at least one"),
        ({"serve": "b"}, "serve = 'b'"),
    ],
)
def test_a_comparison_that_means_nothing_is_refused(
    recipe: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        comparison_of(tmp_path, recipe, **changes)
    assert message in str(error.value)


def test_booked_cells_do_not_pass_for_those_of_another_comparison(recipe: Path, tmp_path: Path) -> None:
    Run(comparison_of(tmp_path, recipe), in_this_process)
    assert (tmp_path / RECIPE).is_file()
    Run(comparison_of(tmp_path, recipe, seeds=[0, 1, 2]), in_this_process)
    with pytest.raises(ConfigError, match="other overrides"):
        Run(comparison_of(tmp_path, recipe, overrides=["train.steps=4"]), in_this_process)
    changed = {**METHODS, "scales": {**METHODS["scales"], "overrides": ["adapter={kind: alphatuning, train: all}"]}}
    with pytest.raises(ConfigError, match=r"methods\.scales was another one"):
        Run(comparison_of(tmp_path, recipe, methods=changed), in_this_process)


def test_runs_that_differ_in_a_varied_value_or_a_rate_have_their_own_folders(recipe: Path, tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, recipe)
    rows = [Row("low rank, then codes", name, (("a.b", value),)) for name in comparison.formats for value in (1, 2)]
    names = {run_name(comparison, Cell(row, rate, seed)) for row in rows for rate in RATES for seed in (0, 1)}
    assert len(names) == 8
    assert "low-rank-then-codes_b-1_lr-0.001_seed-0" in names


@pytest.mark.parametrize("name", resource_names("launch/bench"))
def test_every_shipped_comparison_is_legal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = load_comparison(find_resource(name))
    assert check_comparison(comparison) >= len(comparison.methods)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "methods", name, "--dry-run"])
    assert ended.value.code == 0
    assert "legal" in capsys.readouterr().out
