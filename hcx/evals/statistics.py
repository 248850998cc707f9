"""Standard errors and 95 % intervals, and whether an interval contains chance.

Accuracies: the sample standard error, and Wilson's interval (Wilson 1927), which stays inside [0, 1] and is right also
at 0 and 1. Metrics of a whole set (bits per byte, chrF++, BLEU): items are resampled with replacement (Efron 1979) with
a fixed seed. The interval is the expanded percentile interval (Hesterberg, The American Statistician 69, 2015):
percentiles further out than 2.5 and 97.5 by what few items cost. The standard error is the spread of the resampled
scores times sqrt(n / (n - 1)), for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np

NORMAL = NormalDist()
Z95 = 1.959963984540054
"""97.5th percentile of the standard normal distribution."""

RESAMPLES = 1000
SEED = 20240607
FEW = 12
"""Up to so many pairs, every assignment of signs is tried."""
ROUNDING = 1e-9
"""Of a sum of shares."""
MINIMUM = 2
"""With fewer items there is no spread to estimate."""


@dataclass(frozen=True)
class Estimate:
    """A score with what is known about its error.

    Attributes:
        value: the score.
        stderr: standard error; None with fewer than two items.
        interval: 95 % interval; None with fewer than two items.
        n: items.
        chance: what guessing would score, if that is defined.
        method: how the interval came about.
    """

    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    n: int
    chance: float | None
    method: str

    @property
    def contains_chance(self) -> bool | None:
        """Whether guessing cannot be told from this score; None where chance or the interval is not defined."""
        if self.chance is None or self.interval is None:
            return None
        # One who always says the same is at chance exactly, with an interval of no width: sums may round either way.
        return self.interval[0] - ROUNDING <= self.chance <= self.interval[1] + ROUNDING

    def to_json(self) -> dict[str, Any]:
        """The metric's entry in `results.json`."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            "interval": None if self.interval is None else list(self.interval),
            "n": self.n,
            "chance": self.chance,
            "contains_chance": self.contains_chance,
            "method": self.method,
        }


def accuracy(correct: Sequence[float], chance: float | None = None) -> Estimate:
    """Share of right answers.

    Args:
        correct: 1 or 0 per item.
        chance: mean over the items of 1 / number of options.
    """
    n = len(correct)
    share = math.fsum(correct) / n
    if n < MINIMUM:
        return Estimate(share, None, None, n, chance, "too few items")
    stderr = math.sqrt(share * (1 - share) / (n - 1))
    return Estimate(share, stderr, wilson(share, n), n, chance, "Wilson")


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    z2 = Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum over sum (bits per byte), with documents resampled."""
    table = np.stack([np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)], axis=1)
    return bootstrap(table, lambda rows: float(rows[:, 0].sum() / rows[:, 1].sum()))


def bootstrap(rows: np.ndarray, score: Callable[[np.ndarray], float], resamples: int = RESAMPLES) -> Estimate:
    """A score of a set of rows, with rows resampled."""
    n = len(rows)
    value = score(rows)
    if n < MINIMUM:
        return Estimate(value, None, None, n, None, "too few items")
    generator = np.random.default_rng(SEED)
    scores = np.array([score(rows[generator.integers(0, n, n)]) for _ in range(resamples)])
    # A resample may hold no item of a kind that the score divides by; it says nothing about the score.
    scores = scores[np.isfinite(scores)]
    if len(scores) < resamples // 2:
        return Estimate(value, None, None, n, None, "too few items")
    widening = math.sqrt(n / (n - 1))
    tail = 100 * NORMAL.cdf(-widening * student_t95(n - 1))
    low, high = np.percentile(scores, [tail, 100 - tail])
    stderr = widening * float(scores.std(ddof=1))
    return Estimate(value, stderr, (float(low), float(high)), n, None, f"bootstrap, {resamples}")


def student_t95(freedom: int) -> float:
    """97.5th percentile of Student's t: tabled up to 4 degrees of freedom, then Cornish and Fisher's expansion."""
    tabled = (12.7062, 4.3027, 3.1824, 2.7764)
    if freedom <= len(tabled):
        return tabled[freedom - 1]
    z, n = Z95, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


@dataclass(frozen=True)
class Difference:
    """How two models differ on the same items.

    Attributes:
        value: mean of (second - first).
        interval: 95 % interval, items resampled in pairs; None with fewer than two items.
        p: two-sided probability of a difference at least this large if neither is better; None where not computed.
        n: items.
        method: the test.
    """

    value: float
    interval: tuple[float, float] | None
    p: float | None
    n: int
    method: str


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compares scores of the same items: the exact McNemar test (1947) for right and wrong, else sign flips.

    Pairing takes out what makes items easy or hard for both, so that it finds differences that two intervals hide.

    Args:
        first, second: scores by item, in the same order.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"{len(left)} and {len(right)} items: paired tests need the same items")
    differences = right - left
    estimate = bootstrap(differences, lambda part: float(part.mean()))
    if set(np.unique(np.concatenate([left, right]))) <= {0.0, 1.0}:
        return Difference(estimate.value, estimate.interval, mcnemar(differences), len(left), "exact McNemar")
    probability, test = sign_flips(differences)
    return Difference(estimate.value, estimate.interval, probability, len(left), test)


def mcnemar(differences: np.ndarray) -> float:
    """Two-sided exact p of the items on which only one model is right: a binomial of one half."""
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    discordant = better + worse
    tail = sum(math.comb(discordant, k) for k in range(min(better, worse) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**discordant)))


def sign_flips(differences: Sequence[float] | np.ndarray, flips: int = 9999) -> tuple[float, str]:
    """Two-sided p of a sum of paired differences under random signs (Fisher's randomisation test for pairs).

    Were both alike, each difference might as well have the other sign. All signs of a few are gone through; of more,
    some are drawn with a fixed seed, and what was observed counts as one of them.

    Args:
        differences: one per pair.
        flips: drawn assignments of signs.

    Returns:
        p, and the test's name.
    """
    values = np.asarray(differences, dtype=np.float64)
    # A sum in another order differs in the last digits.
    bar = abs(float(values.sum())) - 1e-9 * float(np.abs(values).sum())
    if len(values) <= FEW:
        bits = (np.arange(1 << len(values))[:, None] >> np.arange(len(values))) & 1
        return float((np.abs((1.0 - 2.0 * bits) @ values) >= bar).mean()), "sign flips, all"
    generator = np.random.default_rng(SEED)
    reached = 1
    # In pieces: all signs at once are items times flips numbers.
    for start in range(0, flips, 1000):
        signs = generator.choice((-1.0, 1.0), size=(min(1000, flips - start), len(values)))
        reached += int((np.abs(signs @ values) >= bar).sum())
    return reached / (flips + 1), f"sign flips, {flips + 1}"
