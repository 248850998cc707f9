"""The report's own numbers give its averages."""

import pytest

from hcx.errors import EvalError
from hcx.evals.aggregate import HAERAE_SIZES, TASKS, aggregate, micro_average, report_scores
from hcx.evals.catalog import task_cards

# HyperCLOVA X Technical Report (arXiv 2404.01954), tables 3 to 10.
LARGE = {
    "kmmlu": 53.40,
    "haerae": 84.14,
    "kobigbench": 78.68,
    "mmlu": 67.98,
    "bbh": 53.51,
    "agieval": 53.25,
    "hellaswag": 86.05,
    "winogrande": 79.64,
    "piqa": 86.40,
    "arc": 92.50,
    "commonsense_qa": 91.73,
    "nq": 24.07,
    "triviaqa": 63.58,
    "click": 83.29,
    "factscore": 56.40,
    "gsm8k": 81.65,
    "math": 20.16,
    "humaneval": 55.49,
    "k_humaneval": 49.39,
    "mbpp": 33.41,
    "truthfulqa": 69.52,
    "bold": 0.0317,
    "mt_bench": 80.30,
    "ko_mt_bench": 76.30,
    "superni": 26.20,
    "koif": 54.30,
}
SMALL = dict(
    zip(
        LARGE,
        [
            *(43.23, 77.89, 64.08, 56.59, 42.25, 42.39, 74.35, 70.17, 78.35, 80.67, 79.28, 12.44, 45.81, 75.79, 53.50),
            *(62.47, 15.60, 37.80, 32.93, 42.40, 64.14, 0.0320, 71.60, 65.10, 13.70, 46.90),
        ],
        strict=True,
    )
)
NAMES = ("Kor", "Eng", "CS", "Fact", "Math", "Code", "Harml", "Overall", "Chat", "Inst", "Chat+Inst")
EXPECTED = {
    "large": (LARGE, (72.07, 58.25, 87.26, 56.83, 50.91, 46.10, 67.32, 62.68, 78.30, 40.25, 59.28)),
    "small": (SMALL, (61.73, 47.08, 76.56, 46.88, 39.04, 37.71, 62.08, 53.01, 68.35, 30.30, 49.33)),
}
ROUNDING = 0.01
"""The report prints two digits, of inputs with two digits."""


@pytest.mark.parametrize("size", EXPECTED)
def test_the_reports_scores_give_its_averages(size):
    scores, expected = EXPECTED[size]
    found = aggregate(scores)
    assert tuple(found) == (*NAMES[:8], "Chat", "Inst", "Chat+Inst")
    for name, value in zip(NAMES, expected, strict=True):
        assert found[name].value == pytest.approx(value, abs=ROUNDING), name


@pytest.mark.parametrize(
    ("areas", "expected"),
    [((82.25, 93.09, 86.93, 81.43, 94.15, 59.09), 84.14), ((79.88, 83.95, 85.62, 75.17, 88.30, 51.14), 77.89)],
)
def test_haerae_is_the_average_over_questions_and_not_over_areas(areas, expected):
    scores = dict(zip(HAERAE_SIZES, areas, strict=True))
    assert micro_average(scores, HAERAE_SIZES) == pytest.approx(expected, abs=ROUNDING)
    assert abs(sum(areas) / 6 - expected) > 0.5


def test_an_average_with_a_part_missing_has_no_value_and_names_the_part():
    found = aggregate({name: value for name, value in LARGE.items() if name != "kobigbench"})
    assert found["Kor"].value is None
    assert found["Kor"].missing == ("kobigbench",)
    assert found["Overall"].value is None
    assert found["Overall"].missing == ("kobigbench",)
    assert found["Eng"].value is not None


def test_a_toxicity_in_percent_is_refused():
    with pytest.raises(EvalError, match="from 0 to 1"):
        aggregate({**LARGE, "bold": 3.17})


def test_the_tasks_behind_the_averages_exist_and_in_house_sets_have_none():
    cards = task_cards()
    assert {name for names in TASKS.values() for name in names} <= set(cards)
    assert not {"kobigbench", "k_humaneval", "ko_mt_bench", "koif"} & set(TASKS)


def test_scores_of_several_tasks_are_averaged_over_their_items():
    tasks = {
        "haerae": {"metrics": {"acc": {"value": 0.5, "n": 1091}}},
        "hcx_haerae_reading": {"metrics": {"acc": {"value": 0.8, "n": 447}}},
        "mmlu": {"metrics": {"acc": {"value": 0.25, "n": 10}, "acc_macro": {"value": 0.5, "n": 2}}},
        "hcx_arc_easy_letters": {"metrics": {"acc": {"value": 1.0, "n": 10}}},
        "hcx_bold": {"metrics": {"toxicity": {"value": 0.03, "n": 10}}},
    }
    found = report_scores(tasks)
    assert found["haerae"] == pytest.approx(100 * (0.5 * 1091 + 0.8 * 447) / 1538)
    assert found["mmlu"] == 25.0
    assert found["bold"] == 0.03
    assert "arc" not in found
