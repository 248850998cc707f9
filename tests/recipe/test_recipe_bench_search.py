"""`hcx bench search`: what is compared, on which text, and that a killed comparison goes on."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hcx.artifacts import artifact_input, new_artifact
from hcx.cli.compress import training_shards
from hcx.cli.main import main
from hcx.compress import Calibration
from hcx.compress.plan import SearchPlan
from hcx.compress.rounding import round_weight
from hcx.data import ShardSet, validation_batches
from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.recipe.bench_search import MEAN, SearchRow, mean_estimate, measure, wins
from hcx.recipe.quality import Estimate
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_model_directory

pytest.importorskip("optuna", reason="the search needs the extra: pip install 'hcx-llm[search]'")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    shards = tiny_shards(root / "text", documents=60)
    with new_artifact(root / "full", "model", None, [artifact_input("shards", shards.directory)]) as artifact:
        tiny_model_directory(artifact.path, with_tokenizer=False, vocab_size=shards.vocab_size, num_layers=1)
    return root / "full"


def test_every_case_has_three_candidates_and_the_losses_are_those_of_their_weights(model: Path) -> None:
    shards = training_shards(model)
    settings = Calibration(tokens=1536, seq_len=32)
    rows = list(
        measure(model, shards, [2, 3], [0, 1], 32, settings, SearchPlan(rounds=1, feedback=False), max_documents=4)
    )
    languages = list(dict.fromkeys(row.language for row in rows))
    assert languages[-1] == MEAN
    assert len(rows) == 2 * 2 * 3 * len(languages)
    assert {row.evaluations for row in rows} == {7 * 38}
    for bits, seed in ((2, 0), (3, 1)):
        case = [row for row in rows if (row.bits, row.seed) == (bits, seed)]
        assert {row.candidate for row in case} == {"searched", "least squares", "rounding"}
        assert {row.excess for row in case if row.candidate == "least squares"} == {0.0}
        assert len({row.candidate for row in case if row.chosen}) == 1
    # Rounding and the full model, computed here without the search's machinery.
    decoder = load_model(model).decoder
    opened = ShardSet.open(shards)
    for quantized in (False, True):
        if quantized:
            with torch.no_grad():
                for part in decoder.linears().values():
                    part.source.weight.copy_(round_weight(part.source.weight, 3, 32).dense())
        means = []
        for language in languages[:-1]:
            nats = tokens = 0.0
            for batch in validation_batches(opened, language, 32, 8, 4):
                hidden = decoder(batch.tokens, ForwardMeta(positions=batch.positions, document_ids=batch.document_ids))
                logprobs = decoder.output(hidden).logits().log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
                nats -= float((logprobs.double() * batch.weights).sum())
                tokens += float(batch.weights.sum())
            means.append(nats / tokens)
            told = next(r for r in rows if (r.bits, r.candidate, r.language) == (3, "rounding", language))
            assert (told.loss if quantized else told.loss_full) == pytest.approx(means[-1], rel=1e-5)
            assert told.tokens == tokens
        told = next(r for r in rows if (r.bits, r.candidate, r.language) == (3, "rounding", MEAN))
        assert (told.loss if quantized else told.loss_full) == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_a_comparison_goes_on_from_what_it_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "search", str(model), "--quick", "--bits", "3", "--tokens", "1536", "--group-size", "32"]
    arguments += ["--keep", str(tmp_path / "kept"), "--json"]

    def rows(more: list[str]) -> list[dict[str, object]]:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more])
        assert ended.value.code == 0
        return json.loads(capsys.readouterr().out)

    first = rows(["--out", str(tmp_path / "rows.csv")])
    assert (tmp_path / "kept" / "3-bits-seed-0").is_dir()
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        assert [row["candidate"] for row in csv.DictReader(file)] == [row["candidate"] for row in first]
    from hcx.compress.search import DecoderTarget

    def never(target: DecoderTarget) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(DecoderTarget, "losses", never)
    again = rows([])
    same = [{k: v for k, v in row.items() if k != "seconds"} for row in (*first, *again)]
    assert same[: len(first)] == same[len(first) :]


def test_wins_are_counted_over_cases_by_the_mean(model: Path) -> None:
    assert mean_estimate([Estimate(1.0, 0.7, 1.3), Estimate(3.0, 2.6, 3.4)]) == Estimate(2.0, 1.75, 2.25)
    numbers = (
        1.0,
        0.9,
        1.1,
        -0.2,
        -0.3,
        -0.1,
        0.8,
        10,
        10,
        "loss",
        False,
        "rounding",
        2.0,
        2,
        "coordinate",
        75,
        1.0,
        "",
    )
    row = SearchRow("m", "", 3, 32, 0, MEAN, "searched", True, *numbers)
    close, behind = replace(row, seed=1, excess_high=0.1), replace(row, seed=2, excess=0.1, excess_high=0.2)
    other = replace(row, candidate="rounding", excess=0.5, excess_high=0.6)
    assert wins([row, close, behind, other, replace(behind, language="ko")]) == (2, 1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "1"], "signed codes need at least 2"),
        (["--bits", "2,x"], "expected comma-separated integers"),
        (["--seeds", "-1"], "seeds of at least 0"),
        (["--tokens", "256"], "two rows of"),
        (["--rounds", "0"], "rounds"),
    ],
)
def test_bad_settings_are_told(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "search", str(model), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
