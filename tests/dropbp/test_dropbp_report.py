"""The report's section on dropped backward passes, and the whole way there by the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hcx.cli.main import main
from hcx.data import ShardSet
from hcx.dropbp import StepCosts, Trained
from hcx.errors import ConfigError
from hcx.obs import read_jsonl
from hcx.recipe import check_recipe, load_train_recipe
from hcx.recipe.bench_dropbp import total_by_time
from hcx.recipe.bench_dropbp_quality import Point, at_time, frozen_sublayers, summarise
from hcx.report.dropbp import dropbp
from hcx.report.evidence import Evidence, Run
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_config

RECIPE = """
name: drops
out: {out}
model: {{vocab_size: {vocab}, hidden_size: 32, intermediate_size: 48, num_layers: 2, num_heads: 2, max_seq_len: 64}}
data: {{shards: {shards}, seq_len: 32}}
dropbp: {{rate: 0.5, probe_at: 0.3}}
train: {{steps: 8, global_batch: 4, micro_batch: 2, validate_every: 0}}
validation: {{max_documents: 2}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dropbp")
    shards = tiny_shards(directory / "shards").directory
    path = directory / "drops.yaml"
    vocab = ShardSet.open(shards).vocab_size
    path.write_text(RECIPE.format(out=directory / "run", shards=shards, vocab=vocab), encoding="utf-8")
    return path


def rows_of(recipe: Path) -> list[dict[str, float]]:
    return [row for row in read_jsonl(recipe.parent / "run" / "metrics.jsonl") if "train/loss" in row]


def test_a_recipe_runs_from_the_command_to_a_report_with_rates_by_sublayer(recipe: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", str(recipe)])
    assert ended.value.code == 0
    rows = rows_of(recipe)
    assert len(rows) == 8
    assert {row["dropbp/rate"] for row in rows} == {0.5}
    probed = [row for row in rows if "dropbp/rate/3" in row]
    assert [row["step"] for row in probed] == [3]  # int(0.3 * 8) steps were done before
    assert all("throughput/mfu" not in row for row in rows)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(recipe.parent / "run"), "--out", str(recipe.parent / "report")])
    assert ended.value.code == 0
    page = (recipe.parent / "report" / "index.html").read_text(encoding="utf-8")
    (part,) = re.findall(r"<section>\n<h2>Dropped backward passes.*?</section>", page, re.DOTALL)
    assert part.count("<svg") == 2
    assert "50.0% of the residual sublayers" in part
    for key in ("dropbp/sensitivity", "dropbp/rate"):
        told = ", ".join(f"{probed[0][f'{key}/{index}']:.3g}" for index in range(4))
        assert told in part


def test_a_run_without_drops_has_no_such_section() -> None:
    run = Run(Path("run"), [{"step": 1, "train/loss": 3.0}], {})
    assert dropbp(Evidence([], runs=[run])) == ""


def test_sensitivities_that_are_no_numbers_are_not_drawn() -> None:
    row = {"step": 1, "train/loss": 3.0, "dropbp/rate": 0.5, "dropbp/flops_saved": 0.3}
    row |= {f"dropbp/rate/{index}": 0.5 for index in range(4)}
    row |= {f"dropbp/sensitivity/{index}": None for index in range(4)}  # type: ignore[misc]
    found = dropbp(Evidence([], runs=[Run(Path("run"), [row], {})]))
    assert found.count("<svg") == 1
    assert "Drop rate" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dropbp.rate=0.95", r"dropbp = .*rate = 0.95 is above cap = 0.9"),
        ("dropbp.rate=-1.0", r"rate = -1; must be from 0 to 1"),
        ("dropbp.rats=0.5", r"dropbp.rats"),
        ("dropbp.mask_rule=fair", r"dropbp.mask_rule"),
        ("dropbp.stages=3", r"dropbp.stages = 3: does not divide the model's 4 residual sublayers"),
        (
            "engine={kind: megatron, pipeline_parallel: 2}",
            r"dropbp.stages = 1: must be a multiple of engine.pipeline_parallel = 2, so that",
        ),
        (
            "engine={kind: megatron, pipeline_parallel: 2, virtual_pipeline_parallel: 2}",
            r"dropbp.stages = 1: must be a multiple of engine.pipeline_parallel = 2 x virtual_pipeline_parallel = 2",
        ),
    ],
)
def test_settings_that_cannot_be_are_answered_with_the_key_and_the_way_out(
    recipe: Path, override: str, message: str
) -> None:
    extra = ["dropbp.stages=1"] if override.startswith("engine") else []
    with pytest.raises(ConfigError, match=message):
        check_recipe(load_train_recipe(recipe, [override, *extra]))


def test_the_benchmark_prints_ratios_predictions_and_the_published_mechanism(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "drops.csv"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "train", "--dropbp", "--quick", "--pairs", "5", "--json", "--out", str(out)])
    assert ended.value.code == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["realised"] == pytest.approx(0.5, abs=0.1)
    # The head's own activations are in the measured share only.
    assert row["stored_predicted"] < row["stored"] < row["stored_predicted"] + 0.1
    assert row["stored"] < row["published_stored"] < 1
    assert row["total"] > 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(("beta", "left", "total"), [(2.0, 0.5, 2 / 3), (2.0, 0.25, 0.5), (1.0, 0.125, 0.5625)])
def test_the_model_of_time_has_the_papers_values(beta: float, left: float, total: float) -> None:
    assert total_by_time(left, beta) == pytest.approx(total)


def test_a_pipeline_is_timed_only_with_drops(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "train", "--pipeline"])
    assert ended.value.code == 2
    assert "add --dropbp" in capsys.readouterr().err


def test_every_arm_of_the_quality_benchmark_runs_once_and_is_summarised(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = recipe.parent / "arms"
    command = ["bench", "dropbp", str(recipe), "train.steps=4", "train.validate_every=2", "--seeds", "2"]
    command += ["--arms", "none,0.5,freeze", "--out", str(out), "--json"]
    for _ in range(2):  # the second time, everything is read
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
        summary = json.loads(capsys.readouterr().out)
        written = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
        assert len(written) == 6
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    with pytest.raises(SystemExit) as ended:
        main([*command, "optim.lr=1e-5", "train.steps=6"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "optim.lr: " in told
    assert "train.steps: 4 there, 6 now" in told
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    languages = {row["metric"] for row in summary}
    assert {(row["arm"], row["seeds"], row["steps"]) for row in summary} == {
        (arm, 2, 4) for arm in ("none", "0.5", "freeze")
    }
    assert all(row["at_end"]["low"] <= row["at_end"]["mean"] <= row["at_end"]["high"] for row in summary)
    assert len(list(out.glob("*.svg"))) == 2 * len(languages)
    lines = (out / "points.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 3 * 2 * 3 * len(languages)


def test_the_frozen_arm_costs_the_backward_of_its_drop_rate() -> None:
    model = tiny_config(num_layers=16)
    count = frozen_sublayers(model, 64, Trained())
    costs = StepCosts(model, 64)
    weights = costs.weights()
    kept = costs.sublayers[count].backward(False) + sum(weights[count + 1 :])
    assert kept == pytest.approx(0.125 * sum(weights), abs=max(weights))
    assert count in (27, 28, 29)


def test_figures_between_validations_lie_on_the_straight_line() -> None:
    points = [
        Point("a", 0, "m", step, seconds, value) for step, seconds, value in ((0, 0, 4.0), (2, 10, 2.0), (4, 30, 1.0))
    ]
    assert [at_time(points, seconds) for seconds in (0.0, 5.0, 20.0, 30.0, 99.0)] == [4.0, 3.0, 1.5, 1.0, 1.0]
    slow = [Point("b", 0, "m", step, 2 * seconds, value) for _, _, _, step, seconds, value in map(vars_of, points)]
    fast, slower = summarise([*points, *slow])
    assert (fast.at_equal_time.mean, slower.at_equal_time.mean) == (1.0, 1.75)
    assert fast.equal_seconds == slower.equal_seconds == 30


def vars_of(point: Point) -> tuple[str, int, str, int, float, float]:
    return (point.arm, point.seed, point.metric, point.step, point.seconds, point.value)


def test_an_unknown_arm_is_answered(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "dropbp", str(recipe), "--arms", "freez"])
    assert ended.value.code == 2
    assert "did you mean 'freeze'" in capsys.readouterr().err
