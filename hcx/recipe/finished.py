"""Whether something finished was made from the recipe that would make it now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hcx.artifacts import read_manifest
from hcx.config import Config, decode
from hcx.errors import CheckpointError, ConfigError

MOST = 5
"""Differences told one by one."""


def require_made_from(directory: Path, kind: str, recipe: Config) -> None:
    """Refuses a finished artifact that another recipe made: it would pass for this one's.

    Args:
        directory: the artifact.
        kind: of artifact.
        recipe: what would make it now, resolved.

    Raises:
        CheckpointError: the recipe differs; says where, with both values.
    """
    stated = read_manifest(directory, kind).config
    try:
        # Through the type: a field that a later hcx added has its default, and is no difference.
        made_from = decode(type(recipe), stated, str(directory)).model_dump(mode="json")
    except ConfigError:
        made_from = stated
    if told := differences(made_from, recipe.model_dump(mode="json")):
        raise CheckpointError(
            f"{directory}: made from another recipe ({told}); name another --out, or remove it to make it again"
        )


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Key path and both values of what differs, the first few told one by one; empty if nothing does."""
    differing = _differences(there, now)
    return "; ".join(differing[:MOST]) + (f"; {len(differing) - MOST} more" if len(differing) > MOST else "")


def _differences(there: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*now, *there])
        return [
            told
            for key in keys
            for told in _differences(there.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if there == now else [f"{path}: {there} there, {now} now"]
