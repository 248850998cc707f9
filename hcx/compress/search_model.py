"""The non-convex search for a model directory: from the plan and a text to packed weights, resumable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hcx.artifacts import artifact_input
from hcx.artifacts.digest import digest_json
from hcx.compress.calibration import collect
from hcx.compress.plan import CompressPlan
from hcx.compress.run import choose_modules
from hcx.compress.search import DecoderTarget, SearchOutcome, search_layers
from hcx.compress.search_study import FEEDBACK_GRIDS, WEIGHT_GRIDS, Acceptance
from hcx.data.batch import MicroBatch
from hcx.errors import ConfigError, DataError
from hcx.kernels import PackedWeight
from hcx.model.load import ModelFiles, canonical_names, load_model


def search_model(
    source: str | Path,
    plan: CompressPlan,
    text: Sequence[MicroBatch],
    directory: Path | None,
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, PackedWeight], SearchOutcome]:
    """Searches the linear layers that a plan quantizes.

    Args:
        source, plan, text: see `search_target`.
        directory: keeps every finished evaluation; the search goes on from there after a kill. None: nothing is kept.
        progress: called with each finished layer's name.

    Returns:
        Packed weights by stem, and what the search found.

    Raises:
        ConfigError: the plan has no search, or `directory` holds one with other settings, text or model.
        DataError: too little text to hold some out.
    """
    target, settings = search_target(source, plan, text)
    outcome = search_planned(target, plan, directory, settings, progress)
    return target.packed(outcome.knobs), outcome


def search_target(
    source: str | Path, plan: CompressPlan, text: Sequence[MicroBatch]
) -> tuple[DecoderTarget, dict[str, Any]]:
    """The model that a plan searches, and what its losses depend on.

    Args:
        source: a full-precision MODEL directory.
        plan: has a `search` section.
        text: a share of its rows, `search.held_out` of each language, is kept from the search, for the choice at the
            end.

    Raises:
        ConfigError: the plan has no search.
        DataError: too little text to hold some out.
    """
    if plan.search is None:
        raise ConfigError("this plan has no search section")
    seen, held_out = split_text(text, plan.search.held_out)
    with ModelFiles(source) as files:
        chosen = choose_modules(files, canonical_names(files), plan)
        read = collect(files.config, files.read, seen) if plan.search.feedback else ()
        grams = {stem: statistics.gram for stem, statistics in read if stem in chosen}
    target = DecoderTarget(
        load_model(source).decoder,
        list(chosen),
        lambda stem: chosen[stem].bits,
        lambda stem: chosen[stem].group_size,
        seen,
        held_out,
        plan.search.objective,
        grams,
    )
    settings: dict[str, Any] = {
        "model": artifact_input("model", source).digest,
        "modules": {stem: [one.bits, one.group_size] for stem, one in chosen.items()},
        "text": digest_json([batch.tokens.tolist() for batch in text]),
        "held_out": plan.search.held_out,
        "objective": plan.search.objective,
    }
    return target, settings


def split_text(text: Sequence[MicroBatch], share: float) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Text to search on, and text to choose on at the end: rows of each language by turns.

    Args:
        text: rows that name their language.
        share: about as much of each language is held out; at most every other row.

    Raises:
        DataError: a language has one row only.
    """
    every = max(2, round(1 / share))
    count: Counter[str] = Counter(source for batch in text for source in batch.sources)
    for language, found in count.items():
        if found < 2:
            raise DataError(
                f"the search needs two rows of {language} at least, one of them to compare on; raise "
                "calibration.tokens or its share"
            )
    met: Counter[str] = Counter()
    parts: tuple[list[MicroBatch], list[MicroBatch]] = ([], [])
    for batch in text:
        rows: tuple[list[int], list[int]] = ([], [])
        for row, language in enumerate(batch.sources):
            met[language] += 1
            # Where a language has fewer rows than that, its last one is held out.
            last = met[language] == count[language] < every
            rows[met[language] % every == 0 or last].append(row)
        for part, numbers in zip(parts, rows, strict=True):
            if numbers:
                part.append(batch.select(numbers))
    return parts


def search_planned(
    target: DecoderTarget,
    plan: CompressPlan,
    directory: Path | None,
    settings: dict[str, Any],
    progress: Callable[[str], None] | None = None,
) -> SearchOutcome:
    """Searches what `search_target` made, with the plan's settings."""
    assert plan.search is not None
    return search_layers(
        target,
        grids=FEEDBACK_GRIDS if plan.search.feedback else WEIGHT_GRIDS,
        rounds=plan.search.rounds,
        sampler=plan.search.sampler,
        rule=Acceptance(slack=plan.search.slack, noise=plan.search.noise),
        directory=directory,
        settings={"digest": digest_json(settings)},
        seed=plan.search.seed,
        progress=progress,
        start=plan.search.start,
    )


def outcome_dict(outcome: SearchOutcome) -> dict[str, Any]:
    """For JSON."""
    return {
        "chosen": outcome.chosen,
        "evaluations": outcome.evaluations,
        "held_out": {name: dict(losses) for name, losses in outcome.held_out.items()},
        "knobs": {name: asdict(knobs) for name, knobs in outcome.knobs.items()},
    }
