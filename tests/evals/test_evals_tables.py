"""Comparison tables: numbers side by side only under one protocol, differences paired, marks in both languages."""

import json
import math

import numpy as np
import pytest

from hcx.artifacts import new_artifact
from hcx.errors import EvalError
from hcx.evals.statistics import accuracy, paired
from hcx.evals.tables import comparison

RIGHT = {"full": [1, 1, 1, 1, 1, 1, 1, 1, 0, 0], "four-bit": [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]}


def result(folder, name, correct, **changes):
    task = {
        "metrics": {"acc": accuracy([float(c) for c in correct], 0.25).to_json()},
        "language": "en",
        "category": "commonsense",
        "version": 1.0,
        "protocol": "letters, 5-shot",
        "shots": 5,
        "rows": ["7"],
        "gap": "another prompt",
        "data": [{"path": "Rowan/hellaswag", "name": None, "revision": "abc123", "part": "half of it"}],
        "items": 10,
        "of": 20,
        "samples": "samples/t.jsonl",
        **changes,
    }
    results = {"tasks": {"t": task}, "skipped": {"kobigbench": "unavailable: in-house"}}
    with new_artifact(folder / name, "eval", {}) as writer:
        (writer.path / "samples").mkdir()
        rows = [{"item": i, "task": "t", "acc": float(c)} for i, c in enumerate(correct)]
        (writer.path / "samples" / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (writer.path / "results.json").write_text(json.dumps(results))
    return folder / name


@pytest.fixture
def runs(tmp_path):
    return [result(tmp_path, name, correct) for name, correct in RIGHT.items()]


def test_a_table_carries_protocol_revision_part_marks_and_what_was_not_run(runs):
    text = comparison(runs)
    (row,) = [line for line in text.splitlines() if line.startswith("| `t`")]
    assert "10 / 20" in row
    assert "0.800 (" in row
    assert "-0.500 (" in row
    assert "p = 0.0625" in row
    assert "not comparable with the HyperCLOVA X report: another prompt" in row
    assert "half of it" in row
    assert "interval contains chance: four-bit" in row
    assert "data Rowan/hellaswag @ abc123" in text
    assert "shots 5" in text
    assert "`kobigbench`: unavailable: in-house" in text


def test_the_table_exists_in_korean(runs):
    text = comparison(runs, "ko")
    assert "HyperCLOVA X 보고서와 비교 불가" in text
    assert "평가 결과" in text
    with pytest.raises(EvalError, match="valid: en, ko"):
        comparison(runs, "fr")


def test_numbers_of_different_protocols_do_not_stand_in_one_row(runs, tmp_path):
    other = result(tmp_path, "zero-shot", RIGHT["full"], shots=0)
    text = comparison([runs[0], other])
    (row,) = [line for line in text.splitlines() if line.startswith("| `t`")]
    assert row.split("|")[5].strip() == ""
    assert "- `t`: zero-shot (shots)" in text


def test_a_folder_that_is_no_result_is_refused(tmp_path):
    with pytest.raises(EvalError, match="not a result directory"):
        comparison([tmp_path])


def test_mcnemar_equals_the_binomial_test():
    from scipy.stats import binomtest

    generator = np.random.default_rng(0)
    first = (generator.random(200) < 0.6).astype(float)
    second = np.where(generator.random(200) < 0.15, 1 - first, first)
    better, worse = int((second > first).sum()), int((second < first).sum())
    found = paired(first, second)
    assert found.p == pytest.approx(binomtest(better, better + worse).pvalue)
    assert found.method == "exact McNemar"
    assert math.isclose(found.value, float((second - first).mean()))


def test_sign_flips_equal_the_exact_permutation_test_of_few_items():
    from itertools import product

    differences = [0.3, -0.1, 0.4, 0.2, 0.5, 0.05, 0.3, -0.2]
    observed = abs(sum(differences))
    signs = list(product((-1, 1), repeat=len(differences)))
    exact = sum(abs(sum(s * d for s, d in zip(row, differences, strict=True))) >= observed - 1e-12 for row in signs)
    found = paired([0.0] * len(differences), differences)
    assert found.p == exact / len(signs)
    assert found.method == "sign flips, all"


def test_equal_models_do_not_differ():
    assert paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]).p == 1.0


def test_different_items_cannot_be_paired():
    with pytest.raises(ValueError, match="need the same items"):
        paired([1.0], [1.0, 0.0])
