"""The errors a user can cause.

Every `HcxError` reaches the user of the command line as one message without a traceback (exit code 2).
A message says what is wrong (key path or file, and the value), what would be accepted, and what to do next.
Mistakes of our own stay ordinary exceptions (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HcxError(Exception):
    """Base of all errors that are the user's to mend."""


class ConfigError(HcxError):
    """A recipe, an override or an option is wrong."""


class DataError(HcxError):
    """Text, shards or a tokenizer are missing, damaged or do not belong together."""


class CheckpointError(HcxError):
    """A checkpoint or a model directory cannot be read or does not fit."""


class TrainingError(HcxError):
    """A run cannot go on: its steps are bad, and the policy says to end it."""


class KernelError(HcxError):
    """No kernel can do what was asked for."""


class EvalError(HcxError):
    """An evaluation cannot be run as asked."""


class LaunchError(HcxError):
    """Processes cannot be started, or a machine lacks what a run needs."""


class PeerLost(LaunchError):
    """Another process of the run is gone or cannot be reached: nothing of the user's to mend, the run is resumable.

    The command line ends with 75 instead of 2.
    """


class MissingExtra(HcxError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'hcx-llm[{extra}]'"
        )
        self.package = package
        self.extra = extra


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A sentence part that suggests the nearest valid name and lists all of them, or the nearest of very many."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=MOST_NAMES // 4, cutoff=0.6)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    if len(names) > MOST_NAMES:
        shown = near or names[: MOST_NAMES // 4]
        return f"{suggestion}valid: {', '.join(shown)}, and {len(names) - len(shown)} more"
    return f"{suggestion}valid: {', '.join(names) if names else '(none)'}"


MOST_NAMES = 40
"""More names than this are not read by anybody."""
