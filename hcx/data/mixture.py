"""Which language each row is of: a fixed pattern that keeps to the shares at every length."""

from __future__ import annotations

from collections.abc import Mapping

from hcx.errors import ConfigError, did_you_mean

PERIOD = 1000
"""Rows after which the pattern repeats; shares are met to one in a thousand."""
MAX_UPSAMPLE = 100.0
"""More repetitions of one source in one epoch are a mistake in a recipe."""


class Mixture:
    """Interleaves languages by shares.

    Row i goes to the language that lags its share most (ties: the first). After any number of rows each language's
    count is within one row per language of its share, so every batch sees the mixture, not only every epoch.

    Args:
        shares: language -> share; scaled to sum to 1.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        whole = sum(shares.values())
        if not shares or min(shares.values()) < 0 or whole <= 0:
            raise ConfigError(f"shares = {dict(shares)}: must be numbers of at least 0, not all of them 0")
        self.shares = {name: share / whole for name, share in shares.items()}
        names = [name for name, share in self.shares.items() if share > 0]
        given = dict.fromkeys(names, 0)
        self._pattern: list[tuple[str, int]] = []
        for row in range(1, PERIOD + 1):
            name = max(names, key=lambda name: self.shares[name] * row - given[name])
            self._pattern.append((name, given[name]))
            given[name] += 1
        self._per_period = given

    def row(self, number: int) -> tuple[str, int]:
        """The language of row `number`, and how many rows of that language came before."""
        period, index = divmod(number, PERIOD)
        name, before = self._pattern[index]
        return name, period * self._per_period[name] + before

    def counts(self, num_rows: int) -> dict[str, int]:
        """How many of the first `num_rows` rows are of each language."""
        period, index = divmod(num_rows, PERIOD)
        counts = {name: period * rows for name, rows in self._per_period.items()}
        for name, _ in self._pattern[:index]:
            counts[name] += 1
        return counts


def checked_shares(shares: Mapping[str, float] | None, default: Mapping[str, float]) -> dict[str, float]:
    """The shares to use; unknown languages are errors, languages left out get nothing."""
    if shares is None:
        return dict(default)
    for name in shares:
        if name not in default:
            raise ConfigError(f"shares.{name}: no such language in the shards; {did_you_mean(name, default)}")
    return dict(shares)
