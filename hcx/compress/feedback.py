"""Quantization that minimises the error of a layer's output, `tr((W - W') H (W - W')^T)` with `H = E[x x^T]`.

Three means, each of which can only lower that error or is the start of the others:

1. Error feedback (GPTQ: Frantar et al., ICLR 2023, section 3): columns are quantized one after another, and the
   columns still to come are changed so that they make up for the error, by the Cholesky factor of `H^-1`. The grid of a
   group is chosen for its weights as they then are, weighted by the diagonal of `H`.
2. Scales for the codes: with all codes fixed, the output error is quadratic in the scales and the offset of a group;
   they are solved group by group (block coordinate descent; ShiftAddLLM and AnyBCQ fit scales to outputs, too).
3. Codes for the scales: column by column, each weight takes the level nearest to the optimum that all others leave it
   (coordinate descent).

2 and 3 in turns are the alternation of Xu et al. under the full input Gram matrix instead of the identity. Uniform
grids are a special case with one step per group. A change is kept, row by row, only if it lowers the error with the
scales as stored, so the error never rises.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from hcx.compress.bcq import check_arguments, checked_importance, coder
from hcx.compress.codes import RIDGE, Codes, levels, pack, signs
from hcx.compress.methods import GridOptions, MethodEntry
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight, coding

DAMPING = 0.01
"""Added to the diagonal of `H`, relative to its mean (GPTQ, section 3.3): rare directions are estimated badly."""
BLOCK = 32
"""Columns whose influence on all others is applied at once: within a block every column updates the rest of it."""


@dataclass
class GridState:
    """A matrix in the course of being quantized.

    Attributes:
        weight: fp32 `[out, in]`, the goal.
        gram: fp32 `[in, in]`, damped.
        patterns: uint8 `[out, in]`.
        scales: fp32 `[out, groups, q]`, values of the stored type.
        offsets: fp32 `[out, groups]`.
        group_size: inputs per group.
        pull: fp32 `[out, in]`, `(W - W') H`: minus half the gradient of the error with respect to `W'`.
    """

    weight: Tensor
    gram: Tensor
    patterns: Tensor
    scales: Tensor
    offsets: Tensor
    group_size: int
    pull: Tensor

    @property
    def bits(self) -> int:
        """Planes."""
        return self.scales.shape[2]

    @property
    def uses_native(self) -> bool:
        """Whether the native library goes through the columns: some five times as fast, on a CPU."""
        return self.weight.device.type == "cpu" and coder() == "native"

    @property
    def grids(self) -> coding.Grids:
        """The same tensors, for the native library."""
        return coding.Grids(self.scales, self.offsets, self.patterns, self.group_size)

    def columns(self, group: int) -> slice:
        """The columns of a group."""
        return slice(group * self.group_size, min((group + 1) * self.group_size, self.weight.shape[1]))

    def values(self, group: int) -> Tensor:
        """`[out, g]`: what a reader gets."""
        table = levels(self.scales[:, group], self.offsets[:, group])
        return table.gather(1, self.patterns[:, self.columns(group)].long())

    def refresh(self) -> None:
        """Recomputes `pull`, which gathers rounding errors as it is updated."""
        rest = torch.cat([self.values(group) for group in range(self.scales.shape[1])], dim=1).sub_(self.weight).neg_()
        self.pull = rest @ self.gram

    def error(self) -> Tensor:
        """Output error of each row, fp64 `[out]`."""
        rest = torch.cat([self.values(group) for group in range(self.scales.shape[1])], dim=1).sub_(self.weight)
        return ((rest @ self.gram).double() * rest).sum(1)

    def codes(self) -> Codes:
        """For packing: coarsest plane first, no negative scale."""
        order = self.scales.abs().sort(dim=2, descending=True, stable=True).indices
        scales = self.scales.gather(2, order)
        spread = torch.arange(self.patterns.shape[1], device=self.patterns.device) // self.group_size
        patterns = torch.zeros_like(self.patterns)
        for plane in range(self.bits):
            source = order[:, :, plane][:, spread].to(torch.uint8)
            flipped = (scales[:, :, plane] < 0)[:, spread]
            positive = ((self.patterns >> source) & 1).bool() ^ flipped
            patterns |= positive.to(torch.uint8) << plane
        return Codes(patterns, scales.abs(), self.offsets)


def quantize_to_outputs(
    weight: Tensor,
    gram: Tensor,
    method: MethodEntry,
    options: GridOptions,
    group_size: int,
    descent: int = 4,
    act_order: bool = False,
) -> PackedWeight:
    """Quantizes a weight so that the layer's outputs change little.

    Args:
        weight: `[out, in]`, finite.
        gram: `[in, in]`, mean of `x x^T` over the inputs that the layer reads.
        method: chooses the grid of each group.
        options: bits, offset and type of the scales.
        group_size: inputs per group; the last may be short.
        descent: rounds of solving scales and choosing codes anew after the feedback; 0 with a uniform method is GPTQ.
        act_order: columns in the order of falling `H_jj`, with grids chosen beforehand from the weights as they are.
            The columns stay where they are stored.

    Raises:
        ConfigError: a setting is out of range, or weight or Gram matrix are not finite or do not belong together.
    """
    state = feedback_state(weight, gram, method, options, group_size, act_order)
    offset = method.uniform or options.offset
    for _ in range(descent):
        if not descend(state, offset, method.uniform, options.scale_dtype):
            break
    return pack(state.codes(), state.group_size, offset, options.scale_dtype)


def feedback_state(
    weight: Tensor,
    gram: Tensor,
    method: MethodEntry,
    options: GridOptions,
    group_size: int,
    act_order: bool = False,
) -> GridState:
    """The state after error feedback; see `quantize_to_outputs` for the arguments."""
    check_arguments(weight, options.bits, group_size, options.scale_dtype)
    out_features, in_features = weight.shape
    group_size = min(group_size, in_features)
    damped = damped_gram(gram, in_features)
    groups = -(-in_features // group_size)
    state = GridState(
        weight=weight.float(),
        gram=damped,
        patterns=torch.zeros(out_features, in_features, dtype=torch.uint8, device=weight.device),
        scales=weight.new_zeros(out_features, groups, options.bits, dtype=torch.float32),
        offsets=weight.new_zeros(out_features, groups, dtype=torch.float32),
        group_size=group_size,
        pull=torch.empty(0),
    )
    diagonal = damped.diagonal()
    if act_order:
        for group in range(groups):
            _choose_grid(state, state.weight, group, method, options, diagonal)
        order = diagonal.argsort(descending=True, stable=True)
    else:
        order = torch.arange(in_features, device=weight.device)
    _feed_back(state, order, None if act_order else (method, options))
    state.refresh()
    return state


def damped_gram(gram: Tensor, in_features: int, damping: float = DAMPING) -> Tensor:
    """A Gram matrix that can be inverted, fp32.

    Args:
        gram: `[in, in]`.
        in_features: of the layer.
        damping: added to the diagonal, relative to its mean.

    Raises:
        ConfigError: its shape is another, or it is not finite.
    """
    if tuple(gram.shape) != (in_features, in_features):
        raise ConfigError(f"a Gram matrix of shape {tuple(gram.shape)}; expected ({in_features}, {in_features})")
    if not torch.isfinite(gram).all():
        raise ConfigError("the Gram matrix of a layer's inputs is not finite; the model overflows on calibration text")
    damped = gram.float().clone(memory_format=torch.contiguous_format)
    mean = float(damped.diagonal().double().mean())
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return damped


def error_shares(gram: Tensor, order: Tensor) -> Tensor:
    """How the error of each column is shared among those visited later.

    Args:
        gram: damped, `[in, in]`.
        order: int64 `[in]`, of the visits.

    Returns:
        fp32 `[in, in]`, upper triangular, in that order: `U` with `U^T U` the inverse of `gram`.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double()[order][:, order]))
    return torch.linalg.cholesky(inverse, upper=True).float().contiguous()


def output_error(weight: Tensor, packed: PackedWeight, gram: Tensor) -> float:
    """`tr((W - W') H (W - W')^T) / tr(W H W^T)`: relative squared error of the layer's outputs."""
    rest = (packed.dequantize() - weight.float()).double()
    whole = weight.double()
    wide = gram.double()
    return float(((rest @ wide) * rest).sum() / ((whole @ wide) * whole).sum())


def _choose_grid(
    state: GridState, current: Tensor, group: int, method: MethodEntry, options: GridOptions, diagonal: Tensor
) -> None:
    where = state.columns(group)
    importance = checked_importance(diagonal[where], where.stop - where.start).repeat(current.shape[0], 1)
    found = method.choose(current[:, where], options, importance)
    state.scales[:, group], state.offsets[:, group] = found.scales, found.offsets


def _feed_back(state: GridState, order: Tensor, choose: tuple[MethodEntry, GridOptions] | None) -> None:
    """Quantizes column after column; grids are chosen as groups are reached, if `choose` is given (natural order)."""
    upper = error_shares(state.gram, order)
    current = state.weight[:, order].contiguous()
    diagonal = state.gram.diagonal()
    in_features, size = current.shape[1], state.group_size
    # Blocks never straddle a group, so that a group's grid sees all errors before it.
    step = min(BLOCK, size) if choose is None or size >= BLOCK else size
    bounds = sorted({*range(0, in_features, size if choose is not None else in_features), in_features})
    for group_start, group_stop in itertools.pairwise(bounds):
        if choose is not None:
            _choose_grid(state, current, group_start // size, *choose, diagonal)
        for start in range(group_start, group_stop, step):
            stop = min(start + step, group_stop)
            if state.uses_native:
                errors = coding.feed_back(state.grids, order, upper, current, start, stop)
            else:
                errors = _feed_back_block(state, order, upper, current, start, stop)
            current[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)


def _feed_back_block(state: GridState, order: Tensor, upper: Tensor, current: Tensor, start: int, stop: int) -> Tensor:
    """`coding.feed_back` in torch, on any device."""
    errors, size = torch.empty_like(current[:, start:stop]), state.group_size
    for column in range(start, stop):
        where = int(order[column])
        table = levels(state.scales[:, where // size], state.offsets[:, where // size])
        chosen = (table - current[:, column : column + 1]).abs_().argmin(1)
        state.patterns[:, where] = chosen.to(torch.uint8)
        value = table.gather(1, chosen[:, None])[:, 0]
        error = (current[:, column] - value) / upper[column, column]
        errors[:, column - start] = error
        current[:, column + 1 : stop].addr_(error, upper[column, column + 1 : stop], alpha=-1)
    return errors


def descend(state: GridState, offset: bool, uniform: bool, scale_dtype: torch.dtype, frozen: int = 0) -> bool:
    """One round: scales and offsets of every group, then codes of every column. Whether anything changed.

    Args:
        state: changed in place.
        offset: groups have a constant.
        uniform: scales stay powers of two apart.
        scale_dtype: the scales are rounded to it.
        frozen: the first so many planes keep their codes, and scales keep falling from plane to plane.
    """
    changed = False
    for group in range(state.scales.shape[1]):
        changed |= _solve_scales(state, group, offset, uniform, scale_dtype, keep_order=frozen > 0)
    for start in range(0, state.weight.shape[1], BLOCK):
        changed |= _choose_codes(state, start, min(start + BLOCK, state.weight.shape[1]), frozen)
    state.refresh()
    return changed


def _solve_scales(
    state: GridState, group: int, offset: bool, uniform: bool, scale_dtype: torch.dtype, keep_order: bool
) -> bool:
    where = state.columns(group)
    gram, pull = state.gram[where, where], state.pull[:, where]
    bits = state.bits
    basis = signs(bits, pull)[state.patterns[:, where].long()]  # [out, g, q]
    if uniform:
        powers = 2.0 ** torch.arange(bits - 1, -1, -1, device=pull.device, dtype=pull.dtype)
        basis = (basis @ powers)[:, :, None]
    if offset:
        basis = torch.cat([basis, torch.ones_like(basis[:, :, :1])], dim=2)
    # Errors are quadratic in the change d of the unknowns: |R - B d|_H^2, so (B^T H B) d = B^T (R H).
    weighted = torch.einsum("jk,okp->ojp", gram, basis)
    normal = torch.einsum("ojp,ojr->opr", basis, weighted).double()
    trace = normal.diagonal(dim1=1, dim2=2).mean(1)
    normal.diagonal(dim1=1, dim2=2).add_((RIDGE * trace)[:, None] + torch.finfo(torch.float64).tiny)
    goal = torch.einsum("ojp,oj->op", basis, pull).double()
    change = torch.linalg.solve(normal, goal[:, :, None])[:, :, 0].float()
    old = state.scales[:, group]
    if uniform:
        half = (old[:, -1] + change[:, 0]).clamp(0, torch.finfo(scale_dtype).max / 2 ** (bits - 1))
        scales = half.to(scale_dtype).float()[:, None] * powers
    else:
        limit = torch.finfo(scale_dtype).max
        scales = (old + change[:, :bits]).clamp(-limit, limit).to(scale_dtype).float()
    # The offset is not rounded: it takes up what the rounding of the scales leaves.
    offsets = state.offsets[:, group]
    if offset:
        moved = scales - old
        shift = (moved[:, -1:] if uniform else moved).double()
        known = (normal[:, -1, :-1] * shift).sum(1)
        offsets = offsets + ((goal[:, -1] - known) / normal[:, -1, -1]).float()
    before = state.values(group)
    after = levels(scales, offsets).gather(1, state.patterns[:, where].long())
    delta = after - before
    gain = ((delta @ gram) * delta - 2 * delta * pull).double().sum(1)
    better = gain < 0
    if keep_order:
        better &= (scales.diff(dim=1) <= 0).all(1) & (scales >= 0).all(1)
    if not bool(better.any()):
        return False
    state.scales[:, group] = torch.where(better[:, None], scales, old)
    state.offsets[:, group] = torch.where(better, offsets, state.offsets[:, group])
    state.pull -= torch.where(better[:, None], delta, 0.0) @ state.gram[where]
    return True


def _choose_codes(state: GridState, start: int, stop: int, frozen: int) -> bool:
    """Coordinate descent over the codes of some columns."""
    pull = state.pull[:, start:stop].clone(memory_format=torch.contiguous_format)
    if state.uses_native:
        deltas = coding.choose_codes(state.grids, state.gram, pull, start, stop, frozen)
    else:
        deltas = _choose_codes_block(state, pull, start, stop, frozen)
    if not bool(deltas.any()):
        return False
    state.pull.addmm_(deltas, state.gram[start:stop], alpha=-1)
    return True


def _choose_codes_block(state: GridState, pull: Tensor, start: int, stop: int, frozen: int) -> Tensor:
    """`coding.choose_codes` in torch, on any device."""
    size, gram = state.group_size, state.gram
    deltas = torch.zeros_like(pull)
    free = torch.arange(1 << (state.bits - frozen), device=pull.device) << frozen
    table, group = torch.empty(0), -1
    for column in range(start, stop):
        if column // size != group:
            group = column // size
            table = levels(state.scales[:, group], state.offsets[:, group])
        place = column - start
        old = state.patterns[:, column].long()[:, None]
        value = table.gather(1, old)
        best = value[:, 0] + pull[:, place] / gram[column, column]
        if frozen:
            candidates = (old & ((1 << frozen) - 1)) + free
            nearest = (table.gather(1, candidates) - best[:, None]).abs_().argmin(1, keepdim=True)
            chosen = candidates.gather(1, nearest)
        else:
            chosen = (table - best[:, None]).abs_().argmin(1, keepdim=True)
        delta = (table.gather(1, chosen) - value)[:, 0]
        state.patterns[:, column] = chosen[:, 0].to(torch.uint8)
        deltas[:, place] = delta
        pull.addr_(delta, gram[column, start:stop], alpha=-1)
    return deltas
