"""Programs from answers, pass@k, infilling prompts; the benchmarks' own solutions pass in the sandbox."""

import itertools
import json
import math

import pytest

from hcx.errors import EvalError
from hcx.evals import programs
from hcx.testing.collection import shared_data

DOC = {
    "prompt": 'from typing import List\n\ndef total(xs: List[int]) -> int:\n    """Sum."""\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}


@pytest.fixture(scope="module")
def in_sandbox():
    try:
        programs.sandbox()
    except EvalError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 5), (6, 4, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(n, c, k):
    right = [i < c for i in range(n)]
    draws = list(itertools.combinations(right, k))
    assert programs.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_many_samples_equals_the_binomials():
    expected = 1 - math.comb(200 - 3, 100) / math.comb(200, 100)
    assert programs.pass_at_k(200, 3, 100) == pytest.approx(expected)


def test_too_few_samples_are_refused():
    with pytest.raises(EvalError, match="at least 100 samples"):
        programs.pass_at_k(64, 10, 100)


@pytest.mark.parametrize(
    "answer",
    [
        "    return sum(xs)\n\ndef other():\n    pass\n",
        "return sum(xs)\n",
        "total = 0\n    for x in xs:\n        total += x\n    return total\n",
        "Here it is:\n```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```\nDone.",
        "```\n    return sum(xs)\n```",
        "    return sum(xs)\nprint('more')",
    ],
)
def test_answers_of_base_and_chat_models_become_programs(answer, in_sandbox):
    assert programs.score_humaneval(DOC, [answer]) == {"pass@1": 1.0}


def test_samples_are_counted_each(in_sandbox):
    answers = ["    return sum(xs)\n", "    return 3\n", "    return sum(xs)\n"]
    assert programs.score_humaneval(DOC, [answers])["pass@1"] == pytest.approx(2 / 3)


def test_mbpp_answers_end_at_done(in_sandbox):
    doc = {"code": "def f(x):\n    return x", "test_list": ["assert f(1) == 1"], "test_imports": ["import math"]}
    assert programs.score_mbpp(doc, ["def f(x):\n    return math.floor(x)\n[DONE]\nnot a program"]) == {"pass@1": 1.0}


def test_mbpp_tests_may_lean_on_imports_of_the_reference(in_sandbox):
    code = "import sys\ndef size(x):\n    return sys.getsizeof(x)"
    doc = {"code": code, "test_list": ["assert size((1, 2)) == sys.getsizeof((1, 2))"], "test_imports": []}
    assert programs.score_mbpp(doc, [code]) == {"pass@1": 1.0}


def test_infilling_orders_are_those_of_the_paper():
    marks = ("<P>", "<S>", "<M>")
    assert programs.psm("a", "b", marks) == "<P>a<S>b<M>"
    assert programs.spm("a", "b", marks) == "<P><S>b<M>a"
    assert programs.spm("", "b", marks) == programs.psm("", "b", marks)


def test_sentinels_come_from_the_tokenizer_or_the_run_is_refused(tmp_path):
    added = [{"content": text} for text in ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert programs.Sentinels.of(tmp_path)[0] == "<|fim_prefix|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added[:2]}))
    with pytest.raises(EvalError, match="no sentinels"):
        programs.Sentinels.of(tmp_path)


def test_an_infilled_program_passes_and_its_middle_may_be_exact(in_sandbox):
    doc = {**DOC, "canonical_solution": "    s = sum(xs)\n", "suffix": "    return s\n"}
    assert programs.score_infilling(doc, ["    s = sum(xs)\n"]) == {"pass@1": 1.0, "exact": 1.0}
    assert programs.score_infilling(doc, ["    s = sum(list(xs))\n"]) == {"pass@1": 1.0, "exact": 0.0}
    assert programs.score_infilling(doc, ["    s = 0\n"]) == {"pass@1": 0.0, "exact": 0.0}


@pytest.mark.slow  # hundreds of sandboxes
@pytest.mark.skipif(shared_data() is None, reason="no collection of data sets: set HCX_SHARED_DATA")
def test_the_benchmarks_own_solutions_pass(in_sandbox):
    from hcx.evals.published_sets import published_sets
    from hcx.evals.sandbox import Limits, Sandbox

    sets = {
        (s.path, s.name): s
        for s in published_sets(shared_data(), {"google-research-datasets/mbpp", "loubnabnl/humaneval_infilling"})
    }
    slow = Sandbox(Limits(seconds=60))
    mbpp = [row for rows in sets["google-research-datasets/mbpp", "sanitized"].splits.values() for row in rows]
    failed = [
        row["task_id"]
        for row in mbpp
        if not slow.check_asserts(
            row["code"], row["test_list"], programs.mbpp_setup(row), programs.defined_names(row["code"])
        ).passed
    ]
    light = sets["loubnabnl/humaneval_infilling", "HumanEval-RandomSpanInfillingLight"].splits["test"]
    whole = [{**row, "all": row["prompt"] + row["canonical_solution"] + row["suffix"]} for row in light]
    failed += [
        row["task_id"]
        for row in whole
        if not slow.check_function(row["all"], row["all"], row["test"], row["entry_point"]).passed
    ]
    assert (len(mbpp), len(light)) == (427, 164)
    assert failed == []
