"""One weight that is served at several widths: the planes of a narrower width are the first ones of a wider width.

Planes are added from the coarsest on. A plane's codes are never changed once a width has been made with it; each width
has scales and offsets of its own, fitted to the planes it reads (AnyBCQ: Park et al., arXiv 2510.10467, section 3).
With a Gram matrix of the layer's inputs, codes and scales of each width are fitted to the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hcx.compress.bcq import check_arguments, split_importance
from hcx.compress.codes import Codes, join_groups, least_squares, levels, pack, split_groups, weighted_mean
from hcx.compress.feedback import GridState, descend, feedback_state
from hcx.compress.methods import GridOptions, MethodEntry
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight


def check_widths(widths: Sequence[int], bits: int, method: MethodEntry) -> None:
    """Refuses widths that cannot be nested.

    Raises:
        ConfigError: they do not rise, do not end at `bits`, or the method's levels are evenly spaced.
    """
    if list(widths) != sorted(set(widths)) or len(widths) < 2 or widths[0] < 1 or widths[-1] != bits:
        raise ConfigError(
            f"widths = {list(widths)}: two or more rising numbers from 1 on, the last of which is bits = {bits}"
        )
    if method.uniform:
        raise ConfigError(
            "widths: evenly spaced levels cannot be fitted anew at each width; use a method of binary codes: "
            "alternating, refined or greedy"
        )


def quantize_nested(
    weight: Tensor,
    widths: Sequence[int],
    method: MethodEntry,
    options: GridOptions,
    group_size: int,
    importance: Tensor | None = None,
) -> PackedWeight:
    """Quantizes to `widths[-1]` planes of which every width in `widths` is a prefix.

    The narrowest width is exactly what the method gives for it alone.

    Args:
        weight: `[out, in]`, finite.
        widths: rising numbers of planes.
        method: chooses the narrowest codes.
        options: rounds, offset and type of the scales; its bits must be the widest width.
        group_size: inputs per group; the last may be short.
        importance: `[in]`, how much a squared error of each column counts.

    Raises:
        ConfigError: a setting is out of range, or the weight is not finite.
    """
    check_widths(widths, options.bits, method)
    check_arguments(weight, options.bits, group_size, options.scale_dtype)
    parts = split_groups(weight.float(), group_size)
    factors = split_importance(importance, weight, group_size)
    narrow = replace(options, bits=widths[0])
    current = [method.choose(part, narrow, factor) for part, factor in zip(parts, factors, strict=True)]
    found = {widths[0]: join_groups(current, weight.shape[0])}
    for width in widths[1:]:
        for _ in range(width - current[0].scales.shape[1]):
            current = [
                _add_plane(part, codes, options, factor)
                for part, codes, factor in zip(parts, current, factors, strict=True)
            ]
        found[width] = join_groups(current, weight.shape[0])
    return _joined(found, group_size, options)


def quantize_nested_to_outputs(
    weight: Tensor,
    gram: Tensor,
    widths: Sequence[int],
    method: MethodEntry,
    options: GridOptions,
    group_size: int,
    descent: int = 4,
    act_order: bool = False,
) -> PackedWeight:
    """As `quantize_nested`, every width fitted to the layer's outputs; see `quantize_to_outputs`."""
    check_widths(widths, options.bits, method)
    state = feedback_state(weight, gram, method, replace(options, bits=widths[0]), group_size, act_order)
    found: dict[int, Codes] = {}
    for width in widths:
        while state.bits < width:
            _add_state_plane(state, options)
            for _ in range(descent):
                if not descend(state, options.offset, False, options.scale_dtype, frozen=state.bits - 1):
                    break
        if width == widths[0]:
            for _ in range(descent):
                if not descend(state, options.offset, False, options.scale_dtype):
                    break
            # From here on planes have their order: coarsest first, no negative scale.
            fixed = state.codes()
            state.patterns, state.scales = fixed.patterns, fixed.scales
        found[width] = Codes(state.patterns.clone(), state.scales.clone(), state.offsets.clone())
    return _joined(found, state.group_size, options)


def _add_plane(groups: Tensor, codes: Codes, options: GridOptions, importance: Tensor | None) -> Codes:
    """One more plane on fixed ones: its signs and all scales in turns; the best found, as stored."""
    bits = codes.scales.shape[1]
    rest = groups - codes.values()
    scale = weighted_mean(rest.abs(), importance).to(options.scale_dtype).float()
    scale = torch.minimum(scale, codes.scales[:, -1])
    fixed = codes.patterns.long()
    best = Codes(
        fixed + ((rest >= 0).long() << bits), torch.cat([codes.scales, scale[:, None]], dim=1), codes.offsets.clone()
    )
    current = best
    for _ in range(max(1, options.rounds)):
        scales, offsets = least_squares(groups, current.patterns, bits + 1, options.offset, importance)
        scales = scales.to(options.scale_dtype).float()
        # A narrower reader drops the last planes, so they must stay the smallest.
        valid = (scales.diff(dim=1) <= 0).all(1) & (scales >= 0).all(1) & torch.isfinite(scales).all(1)
        scales = torch.where(valid[:, None], scales, best.scales)
        offsets = torch.where(valid, offsets, best.offsets)
        table = levels(scales, offsets)
        upper = fixed + (1 << bits)
        nearer = (table.gather(1, upper) - groups).abs() < (table.gather(1, fixed) - groups).abs()
        found = Codes(torch.where(nearer, upper, fixed), scales, offsets)
        if options.offset:
            found.offsets = offsets + weighted_mean(groups - found.values(), importance)
        best = best.better(found, groups, importance)
        if torch.equal(found.patterns, current.patterns):
            break
        current = found
    return best


def _add_state_plane(state: GridState, options: GridOptions) -> None:
    """One more plane on the state's fixed ones, from the signs of what they leave."""
    scales = []
    for group in range(state.scales.shape[1]):
        where = state.columns(group)
        rest = state.weight[:, where] - state.values(group)
        importance = state.gram.diagonal()[where].expand_as(rest)
        scale = weighted_mean(rest.abs(), importance).to(options.scale_dtype).float()
        scales.append(torch.minimum(scale, state.scales[:, group, -1]))
        state.patterns[:, where] |= (rest >= 0).to(torch.uint8) << state.bits
    state.scales = torch.cat([state.scales, torch.stack(scales, dim=1)[:, :, None]], dim=2)
    state.refresh()


def _joined(found: dict[int, Codes], group_size: int, options: GridOptions) -> PackedWeight:
    *widths, widest = found
    packed = pack(found[widest], group_size, options.offset, options.scale_dtype)
    narrow = {}
    for width in widths:
        one = pack(found[width], group_size, options.offset, options.scale_dtype)
        narrow[width] = (one.scales, one.offset)
    return replace(packed, narrow=narrow)
