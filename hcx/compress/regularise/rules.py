"""The rules themselves: pure functions from a weight to its compressed version (Lee et al. 2021, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hcx.compress.bcq import SCALE_DTYPES, quantize
from hcx.compress.codes import padded_groups
from hcx.compress.regularise.config import AnyRule, BCQRule, LowRankRule
from hcx.compress.uniform import from_uniform
from hcx.dist import derived_generator
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight

BUCKET_BITS = 16
"""Magnitudes are counted by half of their bits at a time: two passes find a threshold over any number of weights."""


def decay(weight: Tensor, lr: float, strength: float) -> Tensor:
    """`w (1 - lr * strength)`."""
    return weight * (1.0 - lr * strength)


def add_noise(weight: Tensor, amplitude: float, *seed: int | str) -> Tensor:
    """Adds noise between `-amplitude` and `amplitude` that is a function of the seed: the same on every rank."""
    noise = torch.rand(weight.shape, generator=derived_generator("regularise noise", *seed), dtype=torch.float32)
    return weight + noise.mul_(2).sub_(1).mul_(amplitude).to(weight.device)


def prune(weight: Tensor, count: int) -> Tensor:
    """Zeroes the `count` smallest magnitudes; of equal ones, those with the lower index."""
    flat = weight.flatten()
    order = flat.abs().argsort(stable=True)
    result = flat.clone()
    result[order[:count]] = 0.0
    return result.view_as(weight)


def prune_below(weight: Tensor, threshold: Tensor, ties: int) -> tuple[Tensor, int]:
    """Zeroes magnitudes below a threshold, and the first `ties` of those equal to it; also how many ties are left."""
    size = weight.abs()
    equal = size == threshold
    among = equal.flatten().cumsum(0).view_as(weight) <= ties
    taken = min(ties, int(equal.sum()))
    return weight.masked_fill((size < threshold) | (equal & among), 0.0), ties - taken


def global_threshold(visit: Callable[[Callable[[Tensor], None]], None], count: int) -> tuple[Tensor, int]:
    """The magnitude below which weights are zeroed so that `count` are, and how many of those equal to it go too.

    Args:
        visit: calls a function with every weight; it is called twice. No weight is kept, so memory stays that of one.
        count: weights to zero, at least 1.
    """

    def counts(of: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(1 << BUCKET_BITS, dtype=torch.int64)

        def add(weight: Tensor) -> None:
            # The bits of non-negative floating-point numbers count upwards with them.
            total.add_(torch.bincount(of(weight.abs().flatten().view(torch.int32)).cpu(), minlength=total.numel()))

        visit(add)
        return total

    def place(histogram: Tensor, wanted: int) -> tuple[int, int]:
        """The bucket that holds number `wanted` (from 1), and its number within it."""
        reached = histogram.cumsum(0)
        bucket = int(torch.searchsorted(reached, wanted))
        return bucket, wanted - (int(reached[bucket - 1]) if bucket else 0)

    high, within = place(counts(lambda bits: bits >> BUCKET_BITS), count)
    mask = (1 << BUCKET_BITS) - 1
    low, ties = place(counts(lambda bits: bits[(bits >> BUCKET_BITS) == high] & mask), within)
    return torch.tensor((high << BUCKET_BITS) | low, dtype=torch.int32).view(torch.float32), ties


def truncate_rank(weight: Tensor, rank: int, tile: tuple[int, int]) -> Tensor:
    """The nearest matrix whose tiles have a rank, in fp64: singular values beyond it vanish to fp32's rounding."""
    result = torch.empty_like(weight)
    for rows in _cuts(weight.shape[0], tile[0]):
        for columns in _cuts(weight.shape[1], tile[1]):
            u, s, v = torch.linalg.svd(weight[rows, columns].double(), full_matrices=False)
            result[rows, columns] = ((u[:, :rank] * s[:rank]) @ v[:rank]).to(weight.dtype)
    return result


def _cuts(length: int, step: int) -> Iterable[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def to_grid(weight: Tensor, bits: int, group_size: int) -> PackedWeight:
    """Rounds to the nearest point of a uniform grid per group; a weight that lies on such a grid stays as it is.

    Half the step has 8 significant bits (bf16) and the middle of the grid is a multiple of a sixteenth of it. So grid
    points are exact in fp32, the outermost codes are always used, and the grid is found again from the weights on it.
    (Only a group whose middle is thousands of steps from zero is too far for that; it is rounded all the same.)
    """
    in_features = weight.shape[1]
    group_size = min(group_size, in_features)
    groups = padded_groups(weight, group_size)
    low, high = groups.amin(2).double(), groups.amax(2).double()
    levels = (1 << bits) - 1
    half = ((high - low) / 2 / levels).to(torch.bfloat16).double()
    middle = torch.round((low + high) / 2 / half * 16) / 16
    # A constant group has no step of its own: the grid whose outermost point is the constant.
    flat = half == 0
    half = torch.where(flat, low.abs().to(torch.bfloat16).double(), half)
    middle = torch.where(flat, torch.where(low < 0, levels - 1.0, 1.0 - levels), middle)
    unit = torch.where(half == 0, 1.0, half)
    codes = torch.round((groups.double() / unit[:, :, None] - middle[:, :, None] + levels) / 2).clamp_(0, levels)
    # `s (u - u0)` with s = 2 half: the middle of the codes, levels / 2, lies on `middle * half`.
    zero_point = levels / 2 - middle / 2
    return from_uniform(
        codes.to(torch.uint8).flatten(1)[:, :in_features].contiguous(),
        (2 * half).float(),
        zero_point.float(),
        bits,
        group_size,
        torch.bfloat16,
    )


def pack(rule: AnyRule, weight: Tensor, last: bool) -> PackedWeight:
    """The planes of a weight by a rule that has some."""
    if isinstance(rule, BCQRule):
        rounds = rule.final_rounds if last else rule.rounds
        dtype = SCALE_DTYPES[rule.scale_dtype]
        return quantize(weight, rule.bits, rule.group_size, rule.method, rounds, rule.offset, dtype)
    if rule.kind == "uniform":
        if not torch.isfinite(weight).all():
            raise ConfigError("the weight holds values that are not finite; the model diverged")
        return to_grid(weight, rule.bits, rule.group_size)
    raise TypeError(f"{rule.kind} has no planes")


def low_rank(rule: LowRankRule, weight: Tensor, step: int, last: bool) -> Tensor:
    """A weight with the rank that a rule asks for after `step` steps since the warm-up."""
    tile = rule.tile_of(weight.shape)
    return truncate_rank(weight, rule.rank_at(step, last, min(tile)), tile)
