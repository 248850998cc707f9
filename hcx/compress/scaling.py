"""Scales per input channel that make a weight easier to quantize, folded into what comes before it.

`(W diag(s)) (diag(1/s) x)` is `W x`; where `s > 1` a column is quantized with a relatively finer step. As in AWQ (Lin
et al., MLSys 2024, section 3.2) `s = a^alpha` with `a` the magnitude of the channel's inputs, and alpha is chosen from
a grid by the error of the layer's outputs. `1/s` goes into the norm before q/k/v and gate/up, into the rows of v before
o, and into the rows of up before down, so nothing is left to compute.

Adapters that were trained on the model before do not fit afterwards: their inputs are scaled, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hcx.model.decoder import MLP, Attention, Decoder
from hcx.model.parts.linear import LinearPart
from hcx.model.parts.sources import DenseSource

EXPONENTS = tuple(step / 20 for step in range(20))
"""Of the grid: 0 (no scaling) to 0.95, as in AWQ's code."""
TrialQuantizer = Callable[[str, Tensor], Tensor | None]
"""(stem, weight) -> the weight as it would be read back, or None if this weight is kept."""


@dataclass(frozen=True)
class ScaleSearch:
    """How scales are searched.

    Attributes:
        quantize: a quick stand-in for the real quantizer.
        exponents: the grid; 0 is in it, so the search never raises the error it sees.
    """

    quantize: TrialQuantizer
    exponents: Sequence[float] = EXPONENTS


def fold_scales(
    block: Decoder, parts: Sequence[LinearPart], grams: Sequence[Tensor], search: ScaleSearch
) -> dict[str, Tensor]:
    """Searches scales for each linear part of one block and folds them in; the block computes the same function.

    Args:
        block: a decoder stage of one block, with dense weights; changed in place.
        parts: its linear parts: q/k/v, o, gate/up, down.
        grams: of each part's inputs, `[in, in]`; changed by the folding.
        search: the quantizer and the grid.

    Returns:
        Every dense tensor of the block that is no longer what it was, by canonical name.
    """
    attention, mlp = cast("Attention", block.sublayers[0]), cast("MLP", block.sublayers[1])
    changed: dict[str, Tensor] = {}
    for part, gram in zip(parts, grams, strict=True):
        repeats = _repeats(attention) if part is attention.out else None
        scales = search_scales(part, gram, search, repeats, attention.dim)
        if scales is None:
            continue
        source = _weight(part)
        source.mul_(scales)
        if part is attention.qkv:
            _divide(attention.norm.weight, scales)
            changed[attention.norm.name.name] = attention.norm.weight
        elif part is mlp.gate_up:
            _divide(mlp.norm.weight, scales)
            changed[mlp.norm.name.name] = mlp.norm.weight
        else:
            # Rows of v or of up make the inputs of o or of down.
            before = attention.qkv if part is attention.out else mlp.gate_up
            block_before = before.blocks[-1]
            rows = scales
            if part is attention.out:
                rows = scales.view(-1, _repeats(attention), attention.dim)[:, 0].reshape(-1)
            start, stop = block_before.rows
            _weight(before)[start:stop].div_(rows[:, None])
            changed[f"{block_before.stem}.weight"] = _weight(before)[start:stop]
        for one in part.blocks:
            changed[f"{one.stem}.weight"] = source[one.rows[0] : one.rows[1]]
    return {name: tensor.detach().clone() for name, tensor in changed.items()}


def search_scales(
    part: LinearPart, gram: Tensor, search: ScaleSearch, repeats: int | None = None, head_dim: int = 1
) -> Tensor | None:
    """The best scales `[in]` for the stems of a part together, or None if leaving it as it is is best.

    Args:
        part: with dense weights.
        gram: `[in, in]` of its inputs.
        search: the quantizer and the grid.
        repeats: so many heads in a row read the same values, and must share their scales.
        head_dim: inputs per head.
    """
    magnitude = gram.diagonal().clamp(min=0).sqrt()
    if repeats is not None and repeats > 1:
        shared = magnitude.view(-1, repeats, head_dim).square().mean(1, keepdim=True).sqrt()
        magnitude = shared.expand(-1, repeats, -1).reshape(-1)
    magnitude = magnitude.clamp(min=1e-4 * float(magnitude.max()))
    weight, wide = _weight(part), gram.double()
    best, lowest = None, float("inf")
    for exponent in search.exponents:
        scales = magnitude**exponent
        scales = scales / (scales.max() * scales.min()).sqrt()
        error, any_quantized = 0.0, False
        for one in part.blocks:
            own = weight[one.rows[0] : one.rows[1]]
            found = search.quantize(one.stem, own * scales)
            if found is None:
                continue
            any_quantized = True
            rest = (found / scales - own).double()
            error += float(((rest @ wide) * rest).sum())
        if not any_quantized:
            return None
        if error < lowest:
            best, lowest = (None if exponent == 0 else scales), error
    return best


def _repeats(attention: Attention) -> int:
    return attention.heads[0] // attention.heads[1]


def _weight(part: LinearPart) -> Tensor:
    return cast("DenseSource", part.source).weight


def _divide(weight: Tensor, scales: Tensor) -> None:
    with torch.no_grad():
        weight.div_(scales)
