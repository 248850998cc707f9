"""Tasks of a judge, run by us: lm-eval asks for one answer at a time and cannot hold a dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hcx.errors import DataError, EvalError
from hcx.evals.bundle import read_index, read_rows
from hcx.evals.catalog import TaskCard
from hcx.evals.judge import Judge, Messages, chosen_judge, judge_chat, judge_facts
from hcx.evals.sources import data_directory, read_jsonl
from hcx.evals.statistics import bootstrap

ANSWER_TOKENS = 1024
"""Longest answer, or half of a shorter model's context."""

Measured = tuple[dict[str, Any], list[dict[str, Any]], int]


def is_judged(card: TaskCard) -> bool:
    """Whether a judge scores this card."""
    return card.benchmark is not None and card.benchmark.judged is not None


class LmSpeaker:
    """A model under evaluation as a partner of dialogues.

    Args:
        lm: the lm-eval adapter.
    """

    def __init__(self, lm: Any) -> None:
        self._lm = lm

    def answers(self, dialogues: Sequence[Messages]) -> list[str]:
        """Greedy answers up to the end of the turn; a model without a chat template gets a plain transcript."""
        from lm_eval.api.instance import Instance

        options = {
            "until": ["<|endofturn|>", "\n사용자:", "\nUser:"],
            "do_sample": False,
            "max_gen_toks": min(ANSWER_TOKENS, self._lm.max_length // 2),
        }
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(self._prompt(dialogue), dict(options)), idx=0)
            for dialogue in dialogues
        ]
        return [text.strip() for text in self._lm.generate_until(requests)]

    def _prompt(self, dialogue: Messages) -> str:
        if getattr(self._lm.tokenizer, "chat_template", None):
            return str(self._lm.apply_chat_template(list(dialogue)))
        names = {"user": "User", "assistant": "Assistant"}
        return "\n".join([*(f"{names[m['role']]}: {m['content']}" for m in dialogue), "Assistant:"])


def judged_rows(card: TaskCard, data: str | Path | None) -> list[dict[str, Any]]:
    """Questions of a judged task: `NAME.jsonl` in the folder, or the data set in the bundle.

    Raises:
        DataError: there are none, or a row lacks what it needs.
    """
    folder = data_directory(data)
    facts = card.benchmark is not None and card.benchmark.judged == "factscore"
    keys = ("entity", "article") if facts else ("turns",)
    if folder is not None and (folder / f"{card.name}.jsonl").is_file():
        return read_jsonl(folder / f"{card.name}.jsonl", keys)
    index = read_index(folder) if folder is not None else None
    paths = {path for path, _ in card.datasets}
    for entry in index.datasets if index is not None and folder is not None else ():
        if entry.path in paths:
            rows = [row for split in entry.splits.values() for row in read_rows(folder or "", split)]
            return rows if facts else [_question(row, entry.path) for row in rows]
    raise DataError(f"{card.name}: no questions; put {card.name}.jsonl ({', '.join(keys)}) into a folder for --data")


def _question(row: dict[str, Any], path: str) -> dict[str, Any]:
    turns = row.get("turns") or row.get("prompt")
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"{path}: a question is a list of turns under `turns` or `prompt`; found {', '.join(row)}")
    return {"turns": turns, "reference": row.get("reference"), "category": row.get("category")}


def run_judged(
    card: TaskCard, lm: Any, data: str | Path | None, limit: int | None, judge: Judge | None = None
) -> Measured:
    """Metrics, samples and the number of all items of a judged task."""
    if card.benchmark is None or card.benchmark.judged is None:
        raise EvalError(f"{card.name} has no judge")
    rows = judged_rows(card, data)
    asked = rows[:limit]
    judge = judge or chosen_judge()
    speaker = LmSpeaker(lm)
    if card.benchmark.judged == "factscore":
        samples = judge_facts(asked, speaker, judge)
        # An answer without facts supports none: it lowers the score instead of leaving it.
        shares = [100 * s["supported"] / s["facts"] if s["facts"] else 0.0 for s in samples]
        name = "factscore"
    else:
        samples = judge_chat(asked, speaker, judge, card.metadata.language)
        shares = [float(np.mean(s["ratings"])) for s in samples]
        name = "judge"
    estimate = bootstrap(np.asarray(shares), lambda part: float(part.mean()))
    return {name: estimate.to_json()}, [{"item": i, **s} for i, s in enumerate(samples)], len(rows)
