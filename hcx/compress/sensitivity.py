"""What a loss rises by when some weights are quantized and all others are not.

One group of weights at a time is replaced by what its codes stand for, at each bit width, and the loss is read again
(Chung et al., Findings of EMNLP 2020, section 3.2; no retraining before the reading). Rises of single groups are then
taken to add up, which is the assumption of the allocation, not a fact: the report says what the whole plan cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hcx.errors import ConfigError, DataError
from hcx.model.decoder import Decoder

Quantize = Callable[[str, Tensor, int], Tensor]
"""(stem, weight fp32 `[out, in]`, bits) -> what its codes stand for."""
Loss = Callable[[Decoder], Mapping[str, float]]
"""Language -> loss of a model; smaller is better."""
LEVELS = ("layer", "type", "matrix")


def groups_of(stems: Sequence[str], by: str) -> dict[str, list[str]]:
    """Linear layers of the blocks in groups.

    Args:
        stems: module names such as `model.layers.0.mlp.up_proj`.
        by: `matrix`: each alone; `type`: `up_proj` of all blocks; `layer`: attention and MLP of each block.

    Raises:
        ConfigError: there is no such level.
    """
    if by not in LEVELS:
        raise ConfigError(f"by = {by!r}; allowed: {', '.join(LEVELS)}")
    found: dict[str, list[str]] = {}
    for stem in stems:
        parent, _, kind = stem.rpartition(".")
        key = {"matrix": stem, "type": f"*.{kind}", "layer": f"{parent}.*"}[by]
        found.setdefault(key, []).append(stem)
    return found


def measure_sensitivity(
    decoder: Decoder,
    groups: Mapping[str, Sequence[str]],
    bits: Sequence[int],
    quantize: Quantize,
    loss: Loss,
    progress: Callable[[str], None] | None = None,
    begin: Callable[[Sequence[str]], None] | None = None,
) -> tuple[dict[str, float], dict[str, dict[int, dict[str, float]]]]:
    """Loss of the whole model, and its rise for each group, bit width and language.

    Args:
        decoder: full precision; its weights are put back after each reading, whatever happens.
        groups: name -> module names, see `groups_of`.
        bits: widths to try.
        quantize: the quantizer in question.
        loss: reads the loss on held-out text.
        progress: called after each reading with what was read.
        begin: called before the readings of each group with its modules, while all weights are full precision.

    Raises:
        ConfigError: a group names a module that the model lacks.
        DataError: a loss is not finite at full precision.
    """
    weights = _weights(decoder)
    for name, stems in groups.items():
        for stem in stems:
            if stem not in weights:
                raise ConfigError(f"{name}: the model has no {stem}")
    whole = dict(loss(decoder))
    if not whole or not all(math.isfinite(value) for value in whole.values()):
        raise DataError(f"the loss at full precision is {whole}; nothing can be compared with it")
    rises: dict[str, dict[int, dict[str, float]]] = {}
    for name, stems in groups.items():
        rises[name] = {}
        if begin is not None:
            begin(stems)
        for width in bits:
            with _quantized(weights, stems, quantize, width):
                found = loss(decoder)
            # A model that breaks altogether is infinitely bad, not unusable.
            rises[name][width] = {key: _finite(found[key] - whole[key]) for key in whole}
            if progress is not None:
                progress(f"{name} at {width} bits")
    return whole, rises


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 1e30


def _weights(decoder: Decoder) -> dict[str, Tensor]:
    """Stem -> its rows in the decoder's parameters."""
    parameters: dict[str, nn.Parameter] = dict(decoder.named_parameters())
    return {
        block.name.removesuffix(".weight"): block.view(parameters[local].data)
        for local, blocks in decoder.parameter_map().items()
        for block in blocks
    }


@contextmanager
def _quantized(weights: Mapping[str, Tensor], stems: Sequence[str], quantize: Quantize, bits: int) -> Iterator[None]:
    saved = {stem: weights[stem].clone() for stem in stems}
    try:
        with torch.no_grad():
            for stem in stems:
                weights[stem].copy_(quantize(stem, saved[stem].float(), bits))
        yield
    finally:
        for stem, weight in saved.items():
            weights[stem].copy_(weight)
