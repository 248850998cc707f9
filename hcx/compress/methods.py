"""The quantizers by name: each chooses scales, offsets and codes for groups of weights, group by group.

One function per method, `groups [n, g] -> Codes`, serves plain quantization, quantization with an importance per
column, and error feedback, which asks for the grid of one group of columns at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hcx.compress.bcq import quantize_groups
from hcx.compress.codes import Codes
from hcx.compress.uniform import rounded_groups, searched_groups
from hcx.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class GridOptions:
    """What a method may depend on beside the weights.

    Attributes:
        bits: planes.
        rounds: of alternation.
        offset: a constant per group (uniform grids always have one).
        scale_dtype: that the scales will be stored in.
    """

    bits: int
    rounds: int = 15
    offset: bool = False
    scale_dtype: torch.dtype = torch.float16


ChooseCodes = Callable[[Tensor, GridOptions, Tensor | None], Codes]
"""(groups `[n, g]`, options, importance `[n, g]` or None) -> codes whose scales hold values of the stored type."""


@dataclass(frozen=True)
class MethodEntry:
    """One quantizer.

    Attributes:
        choose: chooses the codes of groups.
        uniform: levels are evenly spaced: scales are powers of two apart, and there is always an offset.
        summary: one line for people.
    """

    choose: ChooseCodes
    uniform: bool
    summary: str


def _uniform(groups: Tensor, options: GridOptions, importance: Tensor | None) -> Codes:
    return rounded_groups(groups, options.bits, options.scale_dtype)


def _searched(groups: Tensor, options: GridOptions, importance: Tensor | None) -> Codes:
    return searched_groups(groups, options.bits, options.scale_dtype, importance)


def _greedy(groups: Tensor, options: GridOptions, importance: Tensor | None) -> Codes:
    return quantize_groups(groups, options.bits, "greedy", 0, options.offset, options.scale_dtype, importance)


def _refined(groups: Tensor, options: GridOptions, importance: Tensor | None) -> Codes:
    return quantize_groups(groups, options.bits, "refined", 0, options.offset, options.scale_dtype, importance)


def _alternating(groups: Tensor, options: GridOptions, importance: Tensor | None) -> Codes:
    rounds = options.rounds
    return quantize_groups(groups, options.bits, "alternating", rounds, options.offset, options.scale_dtype, importance)


METHODS: dict[str, MethodEntry] = {
    "alternating": MethodEntry(_alternating, False, "least-squares scales and nearest codes in turns"),
    "greedy": MethodEntry(_greedy, False, "plane by plane, mean magnitudes of what is left"),
    "refined": MethodEntry(_refined, False, "plane by plane, all scales solved anew after each"),
    "searched": MethodEntry(_searched, True, "an even grid whose range makes the squared error small"),
    "uniform": MethodEntry(_uniform, True, "an even grid over the whole range, rounded to nearest"),
}
ELSEWHERE = {
    "rtn": "method: uniform",
    "gptq": "method: uniform with feedback: true and descent: 0",
    "optq": "method: uniform with feedback: true and descent: 0",
    "awq": "method: searched with importance: true, and calibration.scaling: true",
    "bcq": "method: alternating",
    "nuqmm": "method: alternating",
    "hqq": "method: searched",
}
"""What methods known by other names are called here."""


def find_method(name: str) -> MethodEntry:
    """The method of this name.

    Raises:
        ConfigError: there is none; the nearest name, or how it is said here, is in the message.
    """
    if name in METHODS:
        return METHODS[name]
    known = ELSEWHERE.get(name.lower())
    if known is not None:
        raise ConfigError(f"method = {name!r}: say {known}; valid: {', '.join(METHODS)}")
    raise ConfigError(f"method = {name!r}; {did_you_mean(name, METHODS)}")
