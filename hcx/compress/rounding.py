"""A uniform quantizer with a searched clip and a searched rounding curve (in the style of Q-Rater, Kim et al. 2021).

The framework, hyper-parameters of clipping and rounding chosen by the task loss, is the paper's (arXiv 2105.01868). The
concrete curve and the grids are this project's: its numbers are never the paper's.

Symmetric, `b` bits, `Q = 2^(b-1) - 1`, step `D = kappa * max|w| / Q` per group; `a = |w| / D`, `u = min(a / Q, 1)`:

    tau(u) = clip(1/2 + g0 + g1 (2 u - 1), 0, 1)          the threshold of rounding up
    n = min(floor(a) + [a - floor(a) >= tau(u)], Q)        w' = sign(w) n D

(kappa, g0, g1) = (1, 0, 0) rounds halves up in magnitude: plain rounding to nearest. The curve only moves decisions;
stored integers and steps stay uniform, so the kernels of any uniform weight serve it.

With `damping`, the same rounding goes column by column, and columns still to come make up for the error so far (GPTQ:
Frantar et al., ICLR 2023, section 3). What is added to the diagonal of the Gram matrix says how far that text is
believed: without bound it is rounding by itself again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hcx.compress.bcq import check_arguments
from hcx.compress.codes import padded_groups
from hcx.compress.feedback import BLOCK, damped_gram, error_shares
from hcx.compress.uniform import from_uniform
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight

KAPPAS = tuple(round(0.30 + 0.05 * step, 2) for step in range(15))
TILTS = tuple(round(-0.4 + 0.1 * step, 1) for step in range(9))
SHIFTS = tuple(round(-0.30 + 0.05 * step, 2) for step in range(13))
DAMPINGS = (0.01, 0.003, 0.001, 0.03, 0.1, 0.3, 1.0)
"""The usual one first: where text cannot tell two apart, the earlier one stays."""


@dataclass(frozen=True)
class Knobs:
    """Hyper-parameters of one layer.

    Attributes:
        kappa: clip of the weights, relative to the largest magnitude of a group; in (0, 1].
        g0, g1: shift and tilt of the weights' rounding curve.
        damping: of error feedback across columns, relative to the mean square of the inputs; none: no feedback.
        kappa_a: clip of the activations, relative to their calibrated range.
        g_a: shift of the activations' rounding threshold.
    """

    kappa: float = 1.0
    g0: float = 0.0
    g1: float = 0.0
    damping: float | None = None
    kappa_a: float = 1.0
    g_a: float = 0.0


PLAIN = Knobs()
"""Plain rounding to nearest over the whole range."""


class ErrorShares(NamedTuple):
    """How errors of columns are shared among the columns after them.

    Attributes:
        order: int64 `[in]`, of the visits.
        upper: fp32 `[in, in]`, see `error_shares`.
    """

    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, gram: Tensor, damping: float) -> ErrorShares:
        """Of a Gram matrix `[in, in]`, mean of `x x^T` over what a layer reads; strong inputs are visited first.

        Raises:
            ConfigError: the damping is not above 0, or the matrix is not finite.
        """
        if not damping > 0:
            raise ConfigError(f"damping = {damping}; must be above 0")
        damped = damped_gram(gram, gram.shape[0], damping)
        order = damped.diagonal().argsort(descending=True, stable=True)
        return cls(order, error_shares(damped, order))


@dataclass(frozen=True)
class RoundedWeight:
    """Signed codes and steps.

    Attributes:
        codes: int8 `[out, in]`, from -Q to Q.
        step: fp32 `[out, groups]`; half of it is a number of the stored type.
        bits: of a code.
        group_size: inputs per step; the last group may be short.
    """

    codes: Tensor
    step: Tensor
    bits: int
    group_size: int

    def dense(self) -> Tensor:
        """`[out, in]`, codes times steps."""
        where = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        return self.codes.float() * self.step[:, where]

    def packed(self, scale_dtype: torch.dtype = torch.float16) -> PackedWeight:
        """In the packed format; equal to `dense()` bit for bit with fp16 or bf16 steps."""
        top = 2 ** (self.bits - 1) - 1
        zero = torch.full_like(self.step, float(top))
        return from_uniform(self.codes.long() + top, self.step, zero, self.bits, self.group_size, scale_dtype)


def round_weight(
    weight: Tensor,
    bits: int,
    group_size: int,
    knobs: Knobs = PLAIN,
    scale_dtype: torch.dtype = torch.float16,
    shares: ErrorShares | None = None,
) -> RoundedWeight:
    """Quantizes a weight `[out, in]` with given knobs.

    Args:
        weight: finite.
        bits: 2 to 8 (one bit has no positive code beside zero).
        group_size: inputs per step; a whole row at most.
        knobs: clip and curve.
        scale_dtype: that steps are stored in; they are rounded to it before codes are chosen.
        shares: for `knobs.damping`.

    Raises:
        ConfigError: a setting is out of range, the weight is not finite, or there are no shares for a damping.
    """
    check_arguments(weight, bits, group_size, scale_dtype)
    if (knobs.damping is None) != (shares is None):
        raise ConfigError(f"damping = {knobs.damping}; error feedback needs what the layer reads, and only it does")
    if bits < 2:
        raise ConfigError(f"bits = {bits}; signed codes need at least 2")
    if not 0 < knobs.kappa <= 1:
        raise ConfigError(f"kappa = {knobs.kappa}; must be above 0 and at most 1")
    in_features = weight.shape[1]
    group_size = min(group_size, in_features)
    groups = padded_groups(weight, group_size)
    top = 2 ** (bits - 1) - 1
    half = (knobs.kappa * groups.abs().amax(2) / top / 2).to(scale_dtype).float()
    step = 2 * half
    if shares is not None:
        codes = _round_columns(weight.float(), step, group_size, top, knobs, shares)
        return RoundedWeight(codes.to(torch.int8), step, bits, group_size)
    scaled = groups.abs() / torch.where(step > 0, step, 1.0)[:, :, None]
    magnitude = threshold_round(scaled, scaled / top, knobs.g0, knobs.g1).clamp(max=top)
    codes = (groups.sign() * magnitude).flatten(1)[:, :in_features]
    return RoundedWeight(codes.to(torch.int8), step, bits, group_size)


def _round_columns(
    weight: Tensor, step: Tensor, group_size: int, top: int, knobs: Knobs, shares: ErrorShares
) -> Tensor:
    """Codes `[out, in]`, fp32: column by column, each makes up for its share of the errors before it."""
    order, upper = shares
    # Columns as rows: each visit then reads and writes memory in one piece.
    current = weight.t()[order].contiguous()
    steps = step.t()[order // group_size].contiguous()
    safe = torch.where(steps > 0, steps, 1.0)
    codes = torch.empty_like(current)
    errors = torch.empty_like(current[:BLOCK])
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        for column in range(start, stop):
            scaled = current[column].abs() / safe[column]
            magnitude = threshold_round(scaled, scaled / top, knobs.g0, knobs.g1).clamp_(max=top)
            codes[column] = current[column].sign() * magnitude
            error = (current[column] - codes[column] * steps[column]) / upper[column, column]
            errors[column - start] = error
            current[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
        current[stop:].addmm_(upper[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t()


def threshold_round(scaled: Tensor, relative: Tensor, g0: float, g1: float) -> Tensor:
    """Rounds non-negative numbers up where their fraction reaches `tau(min(relative, 1))`."""
    curve = (0.5 + g0 + g1 * (2 * relative.clamp(max=1) - 1)).clamp(0, 1)
    floor = scaled.floor()
    return floor + (scaled - floor >= curve).to(scaled.dtype)


def round_activations(x: Tensor, bits: int, low: float, high: float, knobs: Knobs = PLAIN) -> Tensor:
    """Activations of any shape on a static grid of a whole tensor, as they would be read back.

    Args:
        x: activations.
        bits: 2 to 8.
        low, high: calibrated range, `low <= 0 <= high`; `kappa_a` clips it.
        knobs: clip and threshold.
    """
    low, high = knobs.kappa_a * low, knobs.kappa_a * high
    step = (high - low) / (2**bits - 1)
    if step <= 0:
        return torch.zeros_like(x)
    inside = x.clamp(low, high)
    magnitude = threshold_round(inside.abs() / step, torch.zeros_like(x), knobs.g_a, 0.0)
    smallest, largest = round(low / step), round(high / step)
    return (inside.sign() * magnitude).clamp(smallest, largest) * step


def mse_knobs(weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16) -> Knobs:
    """The clip of the grid with the smallest squared error of the weight: the usual convex surrogate."""
    best, lowest = PLAIN, float("inf")
    for kappa in reversed(KAPPAS):
        knobs = replace(PLAIN, kappa=kappa)
        rest = round_weight(weight, bits, group_size, knobs, scale_dtype).dense() - weight
        error = float(rest.double().square().sum())
        if error < lowest:
            best, lowest = knobs, error
    return best
