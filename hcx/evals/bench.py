"""Scoring beside lm-eval's `hf` backend: the same model, requests and order of work, in one process, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hcx.errors import EvalError
from hcx.evals.catalog import find_tasks, status_of
from hcx.evals.loading import load_tasks, quiet_lm_eval
from hcx.evals.scoring import likeliest
from hcx.obs import get_logger

log = get_logger(__name__)

AGREE = 1e-4
"""fp32 log-probabilities of one request, in nats."""


@dataclass(frozen=True)
class ScoringRow:
    """One task under both.

    Attributes:
        task: its name.
        items, requests: how many.
        batch_size: rows per forward, of both.
        hcx_s, hf_s: median seconds of all repetitions.
        ratio: median of the repetitions' own ratios, hf over hcx: above 1, hcx is faster.
        low, high: smallest and largest of them.
        largest_difference: of any request's log-probability.
        same_answers: whether every item's chosen option is equal.
    """

    task: str
    items: int
    requests: int
    batch_size: int
    hcx_s: float
    hf_s: float
    ratio: float
    low: float
    high: float
    largest_difference: float
    same_answers: bool

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ComparedRow:
    """One task's answers under both.

    Attributes:
        task: its name.
        items, requests: how many.
        differing: items whose chosen option differs, as `task:item`.
        differing_greedy: requests that are the greedy continuation under one backend only.
        largest_difference: of any request's log-probability.
    """

    task: str
    items: int
    requests: int
    differing: tuple[str, ...]
    differing_greedy: int
    largest_difference: float

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return {**asdict(self), "differing": list(self.differing)}


def measure(
    model: str | Path, tasks: Sequence[str], data: str | Path | None, limit: int, repeats: int = 3, batch_size: int = 8
) -> Iterator[ScoringRow]:
    """Times tasks of multiple choice under both backends in fp32; each row when it is known.

    Args:
        model: a directory in Hugging Face's layout, full precision.
        tasks: names, of multiple choice.
        data: a bundle.
        limit: items of each task.
        repeats: measured rounds, each both backends, in changing order; one more warms up.
        batch_size: rows per forward pass.

    Raises:
        EvalError: a task cannot run here, or is of another kind.
    """
    for name, requests, ours, theirs in _both(model, tasks, data, limit, batch_size):
        if reason := _does_not_fit(requests, ours):
            raise EvalError(f"task {name!r}: {reason}")
        yield _measure(name, requests, ours, theirs, repeats, batch_size)


def compare(
    model: str | Path, tasks: Sequence[str], data: str | Path | None, limit: int | None = None, batch_size: int = 8
) -> Iterator[ComparedRow]:
    """Scores tasks of multiple choice once under each backend in fp32, and holds each item against each; each row when
    it is known.

    Tasks whose options are longer than the model are left out with a warning: neither backend can score them.

    Args:
        model: a directory in Hugging Face's layout, full precision.
        tasks: names, of multiple choice.
        data: a bundle.
        limit: items of each task; None for all.
        batch_size: rows per forward pass.

    Raises:
        EvalError: a task cannot run here, or is of another kind.
    """
    for name, requests, ours, theirs in _both(model, tasks, data, limit, batch_size):
        if reason := _does_not_fit(requests, ours):
            log.warning("%s: left out: %s", name, reason)
            continue
        left, right = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
        chosen, expected = _chosen(requests, left), _chosen(requests, right)
        yield ComparedRow(
            task=name,
            items=len(chosen),
            requests=len(requests),
            differing=tuple(f"{task}:{item}" for (task, item) in chosen if chosen[task, item] != expected[task, item]),
            differing_greedy=sum(a[1] != b[1] for a, b in zip(left, right, strict=True)),
            largest_difference=max(abs(a[0] - b[0]) for a, b in zip(left, right, strict=True)),
        )


def _both(
    model: str | Path, tasks: Sequence[str], data: str | Path | None, limit: int | None, batch_size: int
) -> Iterator[tuple[str, list[Any], Any, Any]]:
    """Each task's name and requests with both backends, which are loaded once."""
    cards = find_tasks(tasks)
    for card in cards:
        status = status_of(card, data)
        if status.status != "runs":
            raise EvalError(f"task {card.name!r}: {status.status}: {status.reason}")
    with quiet_lm_eval():
        from lm_eval.models.huggingface import HFLM

        from hcx.evals.lm import HcxLM

        ours = HcxLM(str(model), batch_size=batch_size, dtype="float32")
        theirs = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=batch_size)
        for card in cards:
            loaded = load_tasks([card], str(model), data)
            found = []
            for name in loaded.parts[card.name]:
                task = loaded.tasks[name]
                task.build_all_requests(limit=limit, rank=0, world_size=1)
                found += task.instances
            if not found or any(request.request_type != "loglikelihood" for request in found):
                raise EvalError(f"task {card.name!r}: this measurement is for multiple choice")
            yield card.name, found, ours, theirs


def _does_not_fit(requests: Sequence[Any], lm: Any) -> str:
    """Why the options do not fit the model; empty if they do."""
    longest = max(len(lm.tok_encode(option)) for option in {request.args[1] for request in requests})
    return (
        "" if longest < lm.max_length else f"options take {longest} tokens, the model {lm.max_length} with the prompt"
    )


def _measure(name: str, requests: list[Any], ours: Any, theirs: Any, repeats: int, batch_size: int) -> ScoringRow:
    answers: dict[str, list[tuple[float, bool]]] = {}
    seconds: dict[str, list[float]] = {"hcx": [], "hf": []}
    order = [("hcx", ours), ("hf", theirs)]
    for number in range(repeats + 1):
        for label, lm in order if number % 2 else order[::-1]:
            start = time.perf_counter()
            answers[label] = lm.loglikelihood(requests, disable_tqdm=True)
            if number:
                seconds[label].append(time.perf_counter() - start)
    ratios = [hf / hcx for hf, hcx in zip(seconds["hf"], seconds["hcx"], strict=True)]
    differences = [abs(a[0] - b[0]) for a, b in zip(answers["hcx"], answers["hf"], strict=True)]
    return ScoringRow(
        task=name,
        items=len({(request.task_name, request.doc_id) for request in requests}),
        requests=len(requests),
        batch_size=batch_size,
        hcx_s=statistics.median(seconds["hcx"]),
        hf_s=statistics.median(seconds["hf"]),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        largest_difference=max(differences),
        same_answers=_chosen(requests, answers["hcx"]) == _chosen(requests, answers["hf"]),
    )


def _chosen(requests: Sequence[Any], answers: Sequence[tuple[float, bool]]) -> dict[tuple[str, int], int]:
    """Each item's option with the highest log-probability; ties go to the first."""
    by_item: dict[tuple[str, int], list[float]] = {}
    for request, (logprob, _) in zip(requests, answers, strict=True):
        by_item.setdefault((str(request.task_name), int(request.doc_id)), []).append(logprob)
    return {item: likeliest(values) for item, values in by_item.items()}
