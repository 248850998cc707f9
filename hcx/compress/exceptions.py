"""Exceptions by name in the sections that compress while training: which of them can have an effect."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from hcx.errors import did_you_mean


def without_effect(section: str, patterns: Sequence[str], linears: Sequence[str]) -> list[str]:
    """One sentence per exception that names no linear layer, or only such as an earlier one takes.

    Args:
        section: of the recipe, for the key in the sentence.
        patterns: of the exceptions, in order; the first match holds.
        linears: names of the linear layers.
    """
    used: set[int] = set()
    for stem in linears:
        used.update([number for number, pattern in enumerate(patterns) if fnmatchcase(stem, pattern)][:1])
    ends = sorted({"*." + stem.rsplit(".", 1)[1] for stem in linears})
    return [
        f"{section}.exceptions.{number}.pattern = {pattern!r} names no linear layer that an earlier one leaves; "
        f"{did_you_mean(pattern, ends)}"
        for number, pattern in enumerate(patterns)
        if number not in used
    ]
