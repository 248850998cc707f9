"""Networks of XOR gates: drawn so that no input is wasted, and reduced where inputs say the same twice."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from hcx.dist import derived_seed
from hcx.errors import ConfigError

Matrix = NDArray[np.uint8]
MAX_IN = 16
"""Of inputs: keys are also searched exhaustively."""


def draw_network(n_in: int, n_out: int, taps: int, seed: int = 0) -> Matrix:
    """A network `[n_out, n_in]` with `taps` ones per row.

    Every row is drawn from the combinations not used yet, those with the least used inputs first, so degrees are nearly
    equal and no two outputs are tied while there is a choice. Draws repeat until the rank is the largest possible:
    `n_in`, less one for an even number of taps, where complementing all inputs changes no output.

    Raises:
        ConfigError: there is no such network.
    """
    if not 1 <= taps <= n_in <= MAX_IN or n_out < 1:
        raise ConfigError(
            f"n_in = {n_in}, n_out = {n_out}, taps = {taps}; must hold 1 <= taps <= n_in <= {MAX_IN} and n_out >= 1"
        )
    generator = np.random.default_rng(derived_seed(seed, "flexor network", n_in, n_out, taps))
    combinations = np.array(list(itertools.combinations(range(n_in), taps)))
    wanted = min(n_out, n_in - (1 if taps % 2 == 0 else 0))
    best: Matrix | None = None
    for _ in range(200):
        matrix = _draw(combinations, n_in, n_out, generator)
        if best is None or rank_gf2(matrix) > rank_gf2(best):
            best = matrix
        if rank_gf2(best) >= wanted:
            break
    assert best is not None
    return best


def _draw(combinations: NDArray[np.int64], n_in: int, n_out: int, generator: np.random.Generator) -> Matrix:
    matrix = np.zeros((n_out, n_in), np.uint8)
    degrees, times = np.zeros(n_in, np.int64), np.zeros(len(combinations), np.int64)
    for row in range(n_out):
        free = np.flatnonzero(times == times.min())
        load = degrees[combinations[free]]
        # The least used inputs: by the largest degree among them, then by their sum.
        cost = load.max(1) * n_in * n_out + load.sum(1)
        chosen = generator.choice(free[cost == cost.min()])
        times[chosen] += 1
        matrix[row, combinations[chosen]] = 1
        degrees[combinations[chosen]] += 1
    return matrix


def rank_gf2(matrix: Matrix) -> int:
    """The rank over GF(2), by elimination."""
    rows = [int("".join(map(str, row)), 2) for row in matrix.tolist()]
    rank = 0
    while rows:
        pivot = rows.pop()
        if pivot:
            rank += 1
            low = pivot & -pivot
            rows = [row ^ pivot if row & low else row for row in rows]
    return rank


def components(matrix: Matrix) -> list[list[int]]:
    """Inputs that rows connect, directly or over others; an input of no row is a component of its own."""
    groups = [{column} for column in range(matrix.shape[1])]
    for row in matrix:
        taps = set(np.flatnonzero(row).tolist())
        touched = [group for group in groups if group & taps]
        groups = [group for group in groups if not group & taps]
        if touched:
            groups.append(set().union(*touched))
    return sorted(sorted(group) for group in groups)


def canonical(matrix: Matrix) -> tuple[Matrix, list[list[int]]]:
    """The smaller network that stores the same planes, for an even number of taps per row.

    Complementing all inputs of a component changes no output; so words can be flipped until the first input of each
    component is 0, and that input need not be stored.

    Returns:
        The matrix without the first column of each component, and the components; unchanged and no components where a
        row has an odd number of taps.
    """
    if (matrix.sum(1) % 2).any():
        return matrix, []
    found = components(matrix)
    kept = [column for column in range(matrix.shape[1]) if column not in {group[0] for group in found}]
    return matrix[:, kept], found


def canonical_words(words: Matrix, found: list[list[int]]) -> Matrix:
    """Words `[n, n_in]` for the network of `canonical`."""
    flipped = words.copy()
    for group in found:
        flipped[:, group] ^= words[:, group[:1]]
    first = {group[0] for group in found}
    return flipped[:, [column for column in range(words.shape[1]) if column not in first]]
