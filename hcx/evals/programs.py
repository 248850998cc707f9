"""HumanEval, MBPP and infilling: prompts, the program that an answer makes, and pass@k in the sandbox.

lm-eval's own tasks run programs in the evaluating process (`unsafe_code`); these run them in `hcx.evals.sandbox`, and
refuse where none can be built.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hcx.errors import EvalError
from hcx.evals.sandbox import Sandbox

Row = dict[str, Any]

STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint", "\nif __name__", "\n```", "<|endofturn|>")
"""What ends a function in a base model's continuation (Chen et al. 2021, section 3.2, and what models of today add)."""


@cache
def sandbox() -> Sandbox:
    """One per process, probed once."""
    return Sandbox()


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimator 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1).

    Raises:
        EvalError: fewer samples than k.
    """
    if samples < k:
        raise EvalError(f"pass@{k} needs at least {k} samples of each problem, found {samples}")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod((samples - correct - i) / (samples - i) for i in range(k))


def cut(text: str, stops: Sequence[str] = STOPS) -> str:
    """A continuation up to the first line that no longer belongs to the function."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def fenced(text: str) -> str | None:
    """The first fenced block of a chat model's answer that is a program; None if there is none."""
    blocks = re.findall(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:\n```|\Z)", text, re.DOTALL)
    return str(blocks[0]) if blocks else None


def humaneval_program(doc: Row, answer: str) -> str:
    """The program of an answer: a fenced whole function as it is, else the prompt and the continuation.

    A base model may leave the first line's indent to the prompt; it is put back (the report repairs it too).
    """
    block = fenced(answer)
    if block is not None:
        whole = f"def {doc['entry_point']}(" in block
        return f"{_imports(doc['prompt'])}\n{block}" if whole else doc["prompt"] + _indented(block)
    return str(doc["prompt"]) + _indented(cut(answer))


def _imports(prompt: str) -> str:
    return "\n".join(line for line in prompt.splitlines() if line.startswith(("import ", "from ")))


def _indented(text: str) -> str:
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None or lines[first].startswith((" ", "\t")):
        return text
    rest = [line for line in lines[first + 1 :] if line.strip()]
    if rest and all(line.startswith((" ", "\t")) for line in rest):
        lines[first] = f"    {lines[first]}"
        return "\n".join(lines)
    return "\n".join(f"    {line}" if line.strip() else line for line in lines)


def _samples(results: Sequence[Any]) -> list[str]:
    return [str(results[0])] if isinstance(results[0], str) else [str(text) for text in results[0]]


def humaneval_counts(doc: Row, answers: Sequence[str]) -> tuple[int, int]:
    """Samples and how many of them pass."""
    verdicts = [
        sandbox().check_function(program, doc["prompt"], doc["test"], doc["entry_point"])
        for program in (humaneval_program(doc, answer) for answer in answers)
    ]
    return len(verdicts), sum(verdict.passed for verdict in verdicts)


def score_humaneval(doc: Row, results: Sequence[Any]) -> dict[str, float]:
    """pass@1 of openai/openai_humaneval: `prompt, test, entry_point`."""
    n, correct = humaneval_counts(doc, _samples(results))
    return {"pass@1": pass_at_k(n, correct, 1)}


def score_humaneval_100(doc: Row, results: Sequence[Any]) -> dict[str, float]:
    """pass@1, @10 and @100 of 200 samples."""
    n, correct = humaneval_counts(doc, _samples(results))
    return {f"pass@{k}": pass_at_k(n, correct, k) for k in (1, 10, 100)}


def defined_names(code: str) -> list[str]:
    """Functions and classes at the top level of a reference solution: what its tests call."""
    return [n.name for n in ast.parse(code).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def mbpp_setup(doc: Row) -> str:
    """Imports of the tests; those of the reference solution too, which some tests lean on."""
    stated = doc.get("test_imports") or doc.get("test_setup_code") or ""
    lines = [stated] if isinstance(stated, str) else list(stated)
    lines += [ast.unparse(n) for n in ast.parse(doc["code"]).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    return "\n".join(lines)


def mbpp_rows(dataset: Any) -> Any:
    """The few-shot split with Austin et al.'s three exemplars (tasks 2, 3 and 4) in front; other splits as they are."""
    from datasets import Dataset

    rows = list(dataset)
    if rows and all(row["task_id"] <= 10 for row in rows):
        rows.sort(key=lambda row: (row["task_id"] not in (2, 3, 4), row["task_id"]))
    return Dataset.from_list(rows)


def mbpp_task(doc: Row) -> str:
    """Task and tests in the words of Austin et al. 2021; `text` in the full set, `prompt` in the sanitised one."""
    tests = "\n".join(doc["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {doc.get('text') or doc['prompt']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def mbpp_exemplar(doc: Row) -> str:
    """A reference solution as an exemplar shows it."""
    return f"{doc['code'].strip()}\n[DONE]"


def mbpp_program(answer: str) -> str:
    """The program of an answer."""
    block = fenced(answer)
    return block if block is not None else answer.split("[DONE]")[0]


def score_mbpp(doc: Row, results: Sequence[Any]) -> dict[str, float]:
    """pass@1 of google-research-datasets/mbpp: `test_list`, and imports of the tests."""
    setup = mbpp_setup(doc)
    names = defined_names(doc["code"])
    verdicts = [
        sandbox().check_asserts(mbpp_program(answer), doc["test_list"], setup, names) for answer in _samples(results)
    ]
    return {"pass@1": pass_at_k(len(verdicts), sum(v.passed for v in verdicts), 1)}


# Infilling (Bavarian et al. 2022, arXiv 2207.14255)


class Sentinels:
    """The three tokens around prefix, suffix and middle, as text, from the model directory's tokenizer."""

    NAMES = (
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<PRE>", "<SUF>", "<MID>"),
    )

    @staticmethod
    def of(directory: Any) -> tuple[str, str, str]:
        """Prefix, suffix and middle.

        Raises:
            EvalError: the tokenizer has none of the known ones: the model was not trained to infill.
        """
        path = Path(str(directory)) / "tokenizer.json"
        if path.is_file():
            added = {token["content"] for token in json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])}
            for names in Sentinels.NAMES:
                if set(names) <= added:
                    return names
        raise EvalError(
            f"{directory}: its tokenizer has no sentinels for infilling (one of "
            f"{'; '.join(' '.join(names) for names in Sentinels.NAMES)}): infilling cannot be measured"
        )


def psm(prefix: str, suffix: str, sentinels: tuple[str, str, str]) -> str:
    """Prefix, suffix, middle: `<PRE> prefix <SUF> suffix <MID>`."""
    pre, suf, mid = sentinels
    return f"{pre}{prefix}{suf}{suffix}{mid}"


def spm(prefix: str, suffix: str, sentinels: tuple[str, str, str]) -> str:
    """Suffix, prefix, middle, variant 2: `<PRE> <SUF> suffix <MID> prefix`, which is PSM with an empty prefix."""
    pre, suf, mid = sentinels
    return f"{pre}{suf}{suffix}{mid}{prefix}"


def infill_prompt(doc: Row) -> str:
    """The prompt in its layout."""
    return str(doc["infill"])


def score_infilling(doc: Row, results: Sequence[Any]) -> dict[str, float]:
    """pass@1 of prefix + middle + suffix, and exact match of the middle without outer blanks."""
    middle = _samples(results)[0]
    program = f"{doc['prompt']}{middle}{doc['suffix']}"
    # Helpers of the tests come from the reference, which is whole; the program never sees it.
    reference = f"{doc['prompt']}{doc['canonical_solution']}{doc['suffix']}"
    verdict = sandbox().check_function(program, reference, doc["test"], doc["entry_point"])
    return {
        "pass@1": float(verdict.passed),
        "exact": float(middle.strip() == str(doc["canonical_solution"]).strip()),
    }
