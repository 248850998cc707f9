"""The HyperCLOVA X report's own averages (arXiv 2404.01954, tables 3 to 10), from scores of benchmarks.

Every number here is a percentage except TruthfulQA's factor (1 - toxicity). A category with a benchmark missing has no
value: an average over what happens to be there would not be the report's average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hcx.errors import EvalError

CATEGORIES: dict[str, tuple[str, ...]] = {
    "Kor": ("kmmlu", "haerae", "kobigbench"),
    "Eng": ("mmlu", "bbh", "agieval"),
    "CS": ("hellaswag", "winogrande", "piqa", "arc", "commonsense_qa"),
    "Fact": ("nq", "triviaqa", "click", "factscore"),
    "Math": ("gsm8k", "math"),
    "Code": ("humaneval", "k_humaneval", "mbpp"),
}
"""Means of percentages."""

HARMLESSNESS = ("truthfulqa", "bold")
"""TruthfulQA mc2 (percent) times one minus BOLD's mean toxicity (0 to 1)."""

OVERALL = (*CATEGORIES, "Harml")
OUTSIDE: dict[str, tuple[str, ...]] = {"Chat": ("mt_bench", "ko_mt_bench"), "Inst": ("superni", "koif")}
"""Kept out of the overall mean; their own mean is `Chat+Inst`."""

HAERAE_SIZES = {
    "loan_word": 169,
    "rare_word": 405,
    "standard_nomenclature": 153,
    "reading": 447,
    "history": 188,
    "general_knowledge": 176,
}
"""Questions per area: the report's HAE-RAE score is the average over questions, not over areas."""

TASKS: dict[str, tuple[str, ...]] = {
    "kmmlu": ("kmmlu",),
    "haerae": ("haerae", "hcx_haerae_reading"),
    "mmlu": ("mmlu",),
    "bbh": ("bbh_fewshot",),
    "agieval": ("agieval_en",),
    "hellaswag": ("hcx_hellaswag_letters",),
    "winogrande": ("hcx_winogrande_letters",),
    "piqa": ("hcx_piqa_letters",),
    "arc": ("hcx_arc_easy_letters", "hcx_arc_challenge_letters"),
    "commonsense_qa": ("commonsense_qa",),
    "nq": ("hcx_nq_open_prefix",),
    "triviaqa": ("hcx_triviaqa_prefix",),
    "click": ("click_kpop", "click_politics", "click_tradition"),
    "factscore": ("hcx_factscore_ko",),
    "gsm8k": ("hcx_gsm8k_maj8",),
    "math": ("hcx_math_maj4",),
    "humaneval": ("hcx_humaneval",),
    "mbpp": ("hcx_mbpp",),
    "truthfulqa": ("hcx_truthfulqa_mc2_5shot",),
    "bold": ("hcx_bold",),
    "mt_bench": ("hcx_mt_bench",),
    "superni": ("hcx_superni",),
}
"""Which of our tasks gives which of the report's numbers; several tasks are averaged over their items."""


@dataclass(frozen=True)
class Average:
    """A category's value, or what keeps it from having one.

    Attributes:
        value: the average; None where a part is missing.
        missing: names of the missing parts.
    """

    value: float | None
    missing: tuple[str, ...] = ()


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return math.fsum(values) / len(values)


def micro_average(scores: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """The average over questions of several parts.

    Raises:
        EvalError: a part has no size.
    """
    absent = sorted(set(scores) - set(sizes))
    if absent:
        raise EvalError(f"no number of questions for {', '.join(absent)}")
    return math.fsum(scores[name] * sizes[name] for name in scores) / sum(sizes[name] for name in scores)


def aggregate(scores: Mapping[str, float]) -> dict[str, Average]:
    """The report's averages from its benchmarks' scores.

    Args:
        scores: by the names in `CATEGORIES`, `HARMLESSNESS` and `OUTSIDE`: percentages; `bold` a toxicity from 0 to 1.

    Returns:
        Kor, Eng, CS, Fact, Math, Code, Harml, Overall, Chat, Inst, Chat+Inst.

    Raises:
        EvalError: a toxicity outside 0 to 1.
    """
    found = {name: _average(scores, parts) for name, parts in CATEGORIES.items()}
    missing = tuple(name for name in HARMLESSNESS if name not in scores)
    if missing:
        found["Harml"] = Average(None, missing)
    else:
        if not 0 <= scores["bold"] <= 1:
            raise EvalError(f"bold = {scores['bold']}; BOLD's mean toxicity is a number from 0 to 1")
        found["Harml"] = Average(scores["truthfulqa"] * (1 - scores["bold"]))
    found["Overall"] = _over(found, OVERALL)
    found.update({name: _average(scores, parts) for name, parts in OUTSIDE.items()})
    found["Chat+Inst"] = _over(found, tuple(OUTSIDE))
    return found


def _average(scores: Mapping[str, float], parts: Sequence[str]) -> Average:
    missing = tuple(part for part in parts if part not in scores)
    return Average(None, missing) if missing else Average(mean([scores[part] for part in parts]))


def _over(found: Mapping[str, Average], names: Sequence[str]) -> Average:
    values = [value for name in names if (value := found[name].value) is not None]
    missing = tuple(part for name in names for part in found[name].missing)
    return Average(None, missing) if len(values) < len(names) else Average(mean(values))


PRIMARY = ("acc", "prefix_match", "maj", "exact_match", "pass@1", "mc2", "toxicity", "rouge_l", "judge", "factscore")
"""The metric that enters an average, the first that a task has."""

PERCENT = frozenset(("acc", "prefix_match", "maj", "exact_match", "pass@1", "mc2"))
"""Metrics from 0 to 1 that the report prints as percentages."""


def report_scores(tasks: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    """The report's benchmark scores from the `tasks` of a `results.json`, where all tasks of a benchmark are there."""
    scores = {}
    for benchmark, names in TASKS.items():
        parts = [_primary(tasks[name]) for name in names if name in tasks]
        if len(parts) == len(names):
            total = sum(n for _, n in parts)
            scores[benchmark] = math.fsum(value * n for value, n in parts) / total
    return scores


def _primary(task: Mapping[str, object]) -> tuple[float, int]:
    metrics: Mapping[str, Mapping[str, float]] = task["metrics"]  # type: ignore[assignment]
    for name in PRIMARY:
        if name in metrics:
            scale = 100 if name in PERCENT else 10 if name == "judge" else 1
            return metrics[name]["value"] * scale, int(metrics[name]["n"])
    raise EvalError(f"none of the metrics {', '.join(metrics)} enters the report's averages")
