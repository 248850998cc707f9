"""`hcx bench search`: the search by the task loss beside the clip of least squared error and plain rounding.

Each case is a number of bits and a seed, which draws the calibration text. All three candidates have even grids of the
same groups, so the same bytes, and are scored on held-out documents that neither the search nor its last choice saw.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hcx.artifacts import digest_file
from hcx.compress import Calibration, CompressPlan, ModulePlan
from hcx.compress.calibration_text import calibration_batches
from hcx.compress.plan import SearchPlan
from hcx.compress.search import put_all
from hcx.compress.search_model import search_planned, search_target
from hcx.compress.text_reader import ScoredRow
from hcx.data import ShardSet, validation_batches
from hcx.errors import DataError
from hcx.model.load import load_model
from hcx.obs import get_logger
from hcx.obs.machine import cpu_name
from hcx.recipe.quality import Estimate, ratio_estimate

SURROGATE = "least squares"
"""The usual convex choice, and what the others are compared with."""
MEAN = "mean"
"""In place of a language: the mean over languages, which is what the search lowers."""


@dataclass(frozen=True)
class SearchRow:
    """One candidate of one case in one language.

    Attributes:
        model, model_digest: what was quantized.
        bits, group_size: of the even grids.
        seed: draws the calibration text.
        language: of the held-out text, or `mean` over languages.
        candidate: `searched`, `least squares` or `rounding`.
        chosen: whether the command would have written it: the best on the calibration text kept from the search.
        loss, loss_low, loss_high: nats per token with its 95 % interval over rows.
        excess, excess_low, excess_high: its loss less that of the clip of least squared error, paired by row.
        loss_full: of the full-precision model.
        tokens: held-out tokens scored.
        search_tokens: of calibration text, those kept for the choice included.
        objective, feedback, start, noise, rounds, sampler: of the search.
        evaluations: of the task loss in the search, over all layers.
        seconds: the search took.
        device: the processor.
    """

    model: str
    model_digest: str
    bits: int
    group_size: int
    seed: int
    language: str
    candidate: str
    chosen: bool
    loss: float
    loss_low: float
    loss_high: float
    excess: float
    excess_low: float
    excess_high: float
    loss_full: float
    tokens: int
    search_tokens: int
    objective: str
    feedback: bool
    start: str
    noise: float
    rounds: int
    sampler: str
    evaluations: int
    seconds: float
    device: str

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


def measure(
    model: Path,
    shards_directory: Path,
    widths: Sequence[int],
    seeds: Sequence[int],
    group_size: int,
    calibration: Calibration,
    search: SearchPlan,
    max_documents: int | None = None,
    keep: Path | None = None,
) -> Iterator[SearchRow]:
    """Searches every case, and scores its three candidates.

    Args:
        model: a full-precision MODEL directory.
        shards_directory: made with its tokenizer; training documents are searched on, held-out ones score.
        widths: bits of the grids.
        seeds: each draws other calibration text.
        group_size: inputs per step.
        calibration: how much text, of which languages, in which rows.
        search: rounds, sampler and guard.
        max_documents: scored per language; all if not given.
        keep: holds every finished evaluation, so that the same call goes on after a kill. None: nothing is kept.

    Raises:
        ConfigError: `keep` holds searches with other settings.
        DataError: there is less calibration text than asked for, or no held-out text.
    """
    shards = ShardSet.open(shards_directory)
    loaded = load_model(model)
    digest = next((digest_file(path) for path in sorted(model.glob("*.safetensors"))), "")
    seq_len = min(calibration.seq_len, loaded.config.max_seq_len)
    text = [
        batch
        for language in shards.languages
        if shards.shard(language, "validation").num_documents
        for batch in validation_batches(shards, language, seq_len, 8, max_documents)
    ]
    if not text:
        raise DataError(f"{shards_directory}: no held-out documents to score on")
    log = get_logger(__name__)
    for seed in seeds:
        drawn = calibration.model_copy(update={"seed": seed})
        batches = calibration_batches(drawn, loaded.config.max_seq_len, loaded.tokenizer, shards)
        for bits in widths:
            plan = CompressPlan(
                default=ModulePlan(bits=bits, group_size=group_size, method="uniform"),
                calibration=drawn,
                search=search.model_copy(update={"seed": seed}),
            )
            target, settings = search_target(model, plan, batches)
            full = target.score_rows(text)
            begun, place = time.perf_counter(), None if keep is None else keep / f"{bits}-bits-seed-{seed}"
            outcome = search_planned(target, plan, place, settings)
            seconds = time.perf_counter() - begun
            scored: dict[str, list[ScoredRow]] = {}
            for name, knobs in outcome.candidates.items():
                put_all(target, knobs)
                scored[name] = target.score_rows(text)
            log.info(
                "%d bits, seed %d: %d evaluations in %.0f s; kept: %s",
                bits,
                seed,
                outcome.evaluations,
                seconds,
                outcome.chosen,
            )
            shared = {
                "model": str(model),
                "model_digest": digest,
                "bits": bits,
                "group_size": group_size,
                "seed": seed,
                "search_tokens": sum(batch.tokens.numel() for batch in batches),
                "objective": search.objective,
                "feedback": search.feedback,
                "start": search.start,
                "noise": search.noise,
                "rounds": search.rounds,
                "sampler": search.sampler,
                "evaluations": outcome.evaluations,
                "seconds": seconds,
                "device": cpu_name(),
            }
            for name, rows in scored.items():
                yield from _rows(name, rows, scored[SURROGATE], full, name == outcome.chosen, shared)


def _rows(
    name: str,
    rows: Sequence[ScoredRow],
    surrogate: Sequence[ScoredRow],
    full: Sequence[ScoredRow],
    chosen: bool,
    shared: dict[str, Any],
) -> Iterator[SearchRow]:
    losses: list[Estimate] = []
    excesses: list[Estimate] = []
    fulls: list[Estimate] = []
    tokens: list[int] = []
    languages = list(dict.fromkeys(row.domain for row in rows))

    def row(language: str, loss: Estimate, excess: Estimate, loss_full: float, counted: int) -> SearchRow:
        return SearchRow(
            language=language,
            candidate=name,
            chosen=chosen,
            loss=loss.value,
            loss_low=loss.low,
            loss_high=loss.high,
            excess=excess.value,
            excess_low=excess.low,
            excess_high=excess.high,
            loss_full=loss_full,
            tokens=counted,
            **shared,
        )

    for language in languages:
        own = [place for place, one in enumerate(rows) if one.domain == language]
        sizes = [rows[place].tokens for place in own]
        losses.append(ratio_estimate([rows[place].nats for place in own], sizes))
        excesses.append(ratio_estimate([rows[place].nats - surrogate[place].nats for place in own], sizes))
        fulls.append(ratio_estimate([full[place].nats for place in own], sizes))
        tokens.append(round(sum(sizes)))
        yield row(language, losses[-1], excesses[-1], fulls[-1].value, tokens[-1])
    yield row(MEAN, mean_estimate(losses), mean_estimate(excesses), mean_estimate(fulls).value, sum(tokens))


def mean_estimate(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates."""
    value = sum(part.value for part in parts) / len(parts)
    half = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / len(parts)
    return Estimate(value, value - half, value + half)


def wins(rows: Sequence[SearchRow], candidate: str = "searched") -> tuple[int, int, int]:
    """Cases in which a candidate's mean loss is below that of the clip of least squared error.

    Returns:
        (below, below outside the interval, cases).
    """
    own = [row for row in rows if row.language == MEAN and row.candidate == candidate]
    return sum(row.excess < 0 for row in own), sum(row.excess_high < 0 for row in own), len(own)
