"""Korean-English sentence pairs to train translation on, disjoint from the held-out pairs that score it.

Files are divided by the hash of their names, as the shipped text's are: what is held out there is left out here, and
of the rest a part is for validation. Software text repeats sentences, so a pair is dropped when either side also occurs
in a held-out or validation pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from hcx.data.packages import PACKAGE_SOURCES, read_package
from hcx.data.shipped import (
    HELD_OUT_FRACTION,
    PAIR_SOURCES,
    aligned_pairs,
    is_held_out,
    name_fraction,
    normalised,
    translation_pairs,
)

VALIDATION_BELOW = HELD_OUT_FRACTION + 0.05
"""Files whose fraction lies between the held-out one and this are for validation."""
PAIRS_PER_DOCUMENT = 4
"""As many as the evaluation's prompt shows, with the one that it asks for."""


def training_pairs(packages: Path) -> list[dict[str, str]]:
    """`ko`, `en`, `source`, `file`, `split` (`train` or `validation`) of all sources, in the order of their files.

    Raises:
        DataError: packages are missing below `packages`.
    """
    found = [
        pair
        for source in PAIR_SOURCES
        for pair in aligned_pairs(read_package(source, packages, "ko"), read_package(source, packages, "en"), source)
        if not is_held_out(pair["file"])
    ]
    is_validation = [name_fraction(pair["file"]) < VALIDATION_BELOW for pair in found]
    scored = _sides(translation_pairs())
    validation = _distinct((pair for pair, held in zip(found, is_validation, strict=True) if held), scored)
    train = _distinct(
        (pair for pair, held in zip(found, is_validation, strict=True) if not held), scored | _sides(validation)
    )
    return [{**pair, "split": "train"} for pair in train] + [{**pair, "split": "validation"} for pair in validation]


def translation_documents(packages: Path) -> list[dict[str, str]]:
    """Rows of text: a few pairs of one file each, in the form in which the evaluation asks for a translation."""
    rows = []
    for (source, file, split), group in itertools.groupby(
        training_pairs(packages), key=lambda pair: (pair["source"], pair["file"], pair["split"])
    ):
        lines = [f"Korean: {pair['ko']}\nEnglish: {pair['en']}\n" for pair in group]
        licence = PACKAGE_SOURCES[source].licence
        rows += [
            {"text": "\n".join(few), "source": source, "file": file, "split": split, "licence": licence}
            for few in (lines[n : n + PAIRS_PER_DOCUMENT] for n in range(0, len(lines), PAIRS_PER_DOCUMENT))
        ]
    return rows


def _sides(pairs: Iterable[dict[str, str]]) -> set[str]:
    return {normalised(pair[language]) for pair in pairs for language in ("ko", "en")}


def _distinct(pairs: Iterable[dict[str, str]], taken: set[str]) -> list[dict[str, str]]:
    """Pairs of which neither side is taken, nor that of an earlier pair."""
    seen, kept = set(taken), []
    for pair in pairs:
        sides = _sides([pair])
        if not sides & seen:
            seen |= sides
            kept.append(pair)
    return kept
