"""The non-convex search for a model directory: from the plan and a text to packed weights, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hcx.artifacts import artifact_input
from hcx.artifacts.digest import digest_json
from hcx.compress.plan import CompressPlan
from hcx.compress.run import choose_modules
from hcx.compress.search import DecoderTarget, SearchOutcome, search_layers
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
        source: a full-precision MODEL directory.
        plan: has a `search` section.
        text: the last `search.held_out` of its rows is kept from the search, for the choice at the end.
        directory: keeps every finished evaluation; the search goes on from there after a kill. None: nothing is kept.
        progress: called with each finished layer's name.

    Returns:
        Packed weights by stem, and what the search found.

    Raises:
        ConfigError: the plan has no search, or `directory` holds one with other settings, text or model.
        DataError: too little text to hold some out.
    """
    if plan.search is None:
        raise ConfigError("this plan has no search section")
    batches = [batch for batch in text if batch.tokens.shape[0]]
    kept = max(1, round(len(batches) * plan.search.held_out))
    if len(batches) < 2:
        raise DataError(
            "the search needs two batches of text at least, one of them to compare on; raise calibration.tokens"
        )
    with ModelFiles(source) as files:
        chosen = choose_modules(files, canonical_names(files), plan)
    # Languages follow each other in the text: every n-th batch is held out, so that each language has some.
    every = max(2, len(batches) // kept)
    held_out = batches[every - 1 :: every]
    seen = [batch for place, batch in enumerate(batches) if place % every != every - 1]
    target = DecoderTarget(
        load_model(source).decoder,
        list(chosen),
        lambda stem: chosen[stem].bits,
        lambda stem: chosen[stem].group_size,
        seen,
        held_out,
    )
    settings: dict[str, Any] = {
        "model": artifact_input("model", source).digest,
        "modules": {stem: [one.bits, one.group_size] for stem, one in chosen.items()},
        "text": digest_json([batch.tokens.tolist() for batch in batches]),
        "slack": plan.search.slack,
    }
    outcome = search_layers(
        target,
        rounds=plan.search.rounds,
        sampler=plan.search.sampler,
        slack=plan.search.slack,
        directory=directory,
        settings={"digest": digest_json(settings)},
        seed=plan.search.seed,
        progress=progress,
    )
    return target.packed(outcome.knobs), outcome


def outcome_dict(outcome: SearchOutcome) -> dict[str, Any]:
    """For JSON."""
    return {
        "chosen": outcome.chosen,
        "evaluations": outcome.evaluations,
        "held_out": {name: dict(losses) for name, losses in outcome.held_out.items()},
        "knobs": {name: asdict(knobs) for name, knobs in outcome.knobs.items()},
    }
