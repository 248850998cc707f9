"""From lm-eval's records of items to metrics with their marks and to rows that a file can hold."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hcx.evals.catalog import task_cards
from hcx.evals.measure import measure


def mean(values):
    return sum(values) / len(values)


def macro_f1(pairs):
    return mean([gold == found for gold, found in pairs])


def record(number, right, names=("acc", "acc_norm", "f1")):
    return {
        "doc_id": number,
        "doc_hash": f"{number}",
        "target": 0,
        "filter": "none",
        "filtered_resps": [(-1.0, True), (-2.0, False)],
        "metrics": list(names),
        "acc": float(right),
        "acc_norm": float(right),
        # lm-eval's predictions are of numpy's argmax.
        "f1": (0, np.int64(not right)),
    }


TASK = SimpleNamespace(aggregation=lambda: {"acc": mean, "acc_norm": mean, "f1": macro_f1})


@pytest.mark.parametrize(("right", "marked"), [(5, True), (10, False)])
def test_accuracies_by_the_raw_and_by_the_divided_likelihood_are_held_against_chance(right, marked):
    rows = [record(n, n < right) for n in range(10)]
    metrics, _ = measure(task_cards()["kobest_boolq"], {"kobest_boolq": (TASK, rows)})
    for name in ("acc", "acc_norm"):
        assert metrics[name]["chance"] == 0.5
        assert metrics[name]["contains_chance"] is marked
    assert metrics["f1"]["chance"] is None


def test_rows_of_samples_are_plain():
    _, samples = measure(task_cards()["kobest_boolq"], {"kobest_boolq": (TASK, [record(0, True), record(1, False)])})
    (first, second) = json.loads(json.dumps(samples))
    assert first["f1"] == [0, 0]
    assert second["f1"] == [0, 1]
    assert second["logprobs"] == [-1.0, -2.0]
