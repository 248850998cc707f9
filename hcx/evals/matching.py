"""Generated answers against gold answers: prefix match, answers of mathematics by majority, ROUGE-L."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from hcx.errors import MissingExtra

Row = dict[str, Any]


def normalise(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces (TriviaQA's and SQuAD's own normalisation)."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def prefix_match(prediction: str, golds: Sequence[str]) -> bool:
    """Whether a prediction starts with any gold answer, up to a word boundary, both normalised.

    Base models run on after the answer; the report counts those answers too (arXiv 2404.01954, section 4).
    """
    said = normalise(prediction)
    wanted = [normalise(gold) for gold in golds]
    return any(gold and (said == gold or said.startswith(f"{gold} ")) for gold in wanted)


def nq_answers(doc: Row) -> list[str]:
    """google-research-datasets/nq_open: `answer` is a list of texts."""
    return [str(a) for a in doc["answer"]]


def trivia_answers(doc: Row) -> list[str]:
    """mandarjoshi/trivia_qa: `answer {value, aliases}`."""
    return [str(doc["answer"]["value"]), *map(str, doc["answer"]["aliases"])]


def first_nq_answer(doc: Row) -> str:
    """What an exemplar shows as the answer."""
    return nq_answers(doc)[0]


def first_trivia_answer(doc: Row) -> str:
    """What an exemplar shows as the answer."""
    return trivia_answers(doc)[0]


def score_nq(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Prefix match of one answer."""
    return {"prefix_match": float(prefix_match(str(results[0]), nq_answers(doc)))}


def score_trivia(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Prefix match of one answer."""
    return {"prefix_match": float(prefix_match(str(results[0]), trivia_answers(doc)))}


def all_samples(responses: Sequence[Sequence[str]], docs: Sequence[Row]) -> list[list[str]]:
    """lm-eval filter: every sample of an item goes to the score, not only the first."""
    return [list(samples) for samples in responses]


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; the first to occur where counts are equal. None (unparseable) is a vote of its own."""
    counts: dict[str | None, int] = {}
    for answer in answers:
        counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=lambda answer: counts[answer]) if counts else None


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def number(text: str) -> str | None:
    """A number in one spelling: no commas, no currency, no trailing zeros; None if there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    value = found[-1].replace(",", "").replace("$", "")
    whole, _, fraction = value.partition(".")
    fraction = fraction.rstrip("0")
    whole = re.sub(r"^(-?)0+(?=\d)", r"\1", whole)
    return f"{whole}.{fraction}" if fraction else ("0" if whole == "-0" else whole)


def gsm8k_answer(text: str) -> str | None:
    """The number after "The answer is" or `####`; else the last one. What follows a new question is not read."""
    text = re.split(r"\n\s*(?:Q:|Question:)", text)[0]
    stated = re.findall(r"(?:The answer is|####)\s*:?\s*(-?\$?[\d,]+(?:\.\d+)?)", text)
    return number(stated[0] if stated else text)


def gsm8k_gold(doc: Row) -> str | None:
    """openai/gsm8k: `answer` ends with `#### number`."""
    return number(str(doc["answer"]).rsplit("####", 1)[-1])


def gsm8k_exemplar(doc: Row) -> str:
    """A worked solution as an exemplar shows it: no calculator marks, the answer in words."""
    steps, _, answer = str(doc["answer"]).rpartition("####")
    return f"{' '.join(re.sub(r'<<.*?>>', '', steps).split())} The answer is {answer.strip()}."


def score_gsm8k(doc: Row, results: Sequence[Sequence[str] | str]) -> dict[str, float]:
    """Accuracy of the majority of k samples, and of the first sample."""
    samples = [results[0]] if isinstance(results[0], str) else list(results[0])
    gold = gsm8k_gold(doc)
    answers = [gsm8k_answer(sample) for sample in samples]
    return {
        "maj": float(gold is not None and majority(answers) == gold),
        "first": float(gold is not None and answers[0] == gold),
    }


def score_gsm8k_once(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Accuracy of one answer."""
    return {"acc": score_gsm8k(doc, results)["first"]}


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`, braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            if depth == 0:
                return text[begin:place]
            depth -= 1
    return None


def math_form(text: str | None) -> str | None:
    """One spelling of a short LaTeX answer: spacing, size commands, units in words, dollar signs and fraction forms."""
    if text is None:
        return None
    text = re.sub(r"\\(?:left|right|!|,|;|:|quad|qquad|displaystyle)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r" \1", text).replace("\\$", "").replace("$", "")
    text = text.replace("\\%", "").replace("%", "").replace("tfrac", "frac").replace("dfrac", "frac")
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text.strip())
    text = re.sub(r"(\d),(?=\d{3}(?!\d))", r"\1", text).rstrip(".")
    text = re.sub(r"^\w+\s*=\s*", "", text.strip())
    return re.sub(r"\s+", "", text) or None


def math_answer(text: str) -> str | None:
    """The answer of a sample: after "the final answer is", else the last box; None if it states none."""
    text = text.split("\nProblem:")[0]
    stated = re.findall(r"[Ff]inal [Aa]nswer:? (?:The final answer )?is:?\s*(.*?)(?:\. I hope|\n|$)", text)
    return math_form(stated[-1]) if stated else math_form(boxed(text))


def score_math(doc: Row, results: Sequence[Sequence[str] | str]) -> dict[str, float]:
    """Accuracy of the majority of k samples by spelling, and of the first; EleutherAI/hendrycks_math: `solution`."""
    samples = [results[0]] if isinstance(results[0], str) else list(results[0])
    gold = math_form(boxed(str(doc["solution"])))
    answers = [math_answer(sample) for sample in samples]
    return {
        "maj": float(gold is not None and majority(answers) == gold),
        "first": float(gold is not None and answers[0] == gold),
    }


def math_exemplar(doc: Row) -> str:
    """A solution as an exemplar shows it, with Minerva's closing sentence."""
    return (
        f"{doc['solution']}\nFinal Answer: The final answer is ${boxed(str(doc['solution']))}$. I hope it is correct."
    )


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 of the best reference, stemmed, as Super-NaturalInstructions scores English (rouge_score).

    Raises:
        MissingExtra: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtra("rouge-score", "eval", "ROUGE-L") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return max(float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in references)


def super_ni(dataset: Any) -> Any:
    """Muennighoff/natural-instructions, test: the first 10 instances of each task, as the official evaluation takes.

    Columns: `task_name, definition, inputs, targets`; rows of one instance with several targets are joined.
    """
    from datasets import Dataset

    kept: dict[str, dict[str, Row]] = {}
    for row in dataset:
        instances = kept.setdefault(row["task_name"], {})
        if row["inputs"] in instances:
            instances[row["inputs"]]["targets"].append(row["targets"])
        elif len(instances) < 10:
            instances[row["inputs"]] = {
                "task_name": row["task_name"],
                "definition": row["definition"],
                "inputs": row["inputs"],
                "targets": [row["targets"]],
            }
    return Dataset.from_list([row for instances in kept.values() for row in instances.values()])


def user_instructions(dataset: Any) -> Any:
    """yizhongw/self-instruct, user-oriented: `instruction, instances [{input, output}]`, the first instance of each."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "task_name": "",
                "definition": row["instruction"],
                "inputs": row["instances"][0]["input"],
                "targets": [row["instances"][0]["output"]],
            }
            for row in dataset
        ]
    )


def super_ni_prompt(doc: Row) -> str:
    """Definition and input, in the layout of Tk-Instruct without exemplars; an instruction may have no input."""
    given = f"\nInput: {doc['inputs']}" if doc["inputs"].strip() else ""
    return f"Definition: {doc['definition']}\n\nNow complete the following example -{given}\nOutput:"


def first_target(doc: Row) -> str:
    """The first reference."""
    return str(doc["targets"][0])


def score_super_ni(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """ROUGE-L times 100, as the report prints it."""
    return {"rouge_l": 100 * rouge_l(str(results[0]), [str(t) for t in doc["targets"]])}


def truthful_mc2(doc: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """mc2 (Lin et al. 2022): the probability of the true answers among all answers, normalised over the set."""
    import numpy as np

    logprobs = np.array([float(answer[0]) for answer in results])
    probabilities = np.exp(logprobs - logprobs.max())
    labels = np.array(doc["mc2_targets"]["labels"])
    return {"mc2": float(probabilities[labels == 1].sum() / probabilities.sum())}
