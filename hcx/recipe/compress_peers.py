"""Other libraries' quantizers, each given the same weight and the same second moments of its inputs.

The doors to `hqq` and `llmcompressor`. What they store is counted as they store it: `bits` per weight, an fp16 scale
per group, and a zero point per group (fp16 in HQQ, `bits` wide in GPTQ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hcx.compress import InputStatistics
from hcx.errors import ConfigError, MissingExtra

SCALE_BITS = 16
QuantizePeer = Callable[[Tensor, InputStatistics, int, int], Tensor]
"""(weight `[out, in]`, statistics, bits, group size) -> the weight as it would be read back."""


@dataclass(frozen=True)
class Peer:
    """Another library's quantizer.

    Attributes:
        library: the package, or `hcx` for plain rounding.
        quantize: one weight.
        zero_bits: bits of a zero point, for so many bits per weight.
    """

    library: str
    quantize: QuantizePeer
    zero_bits: Callable[[int], int]

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        """With scales and zero points as the library stores them."""
        return bits + (SCALE_BITS + self.zero_bits(bits)) / group_size

    @property
    def version(self) -> str:
        """Of the library."""
        return "" if self.library == "hcx" else version(self.library)


def find_peers(names: list[str] | None = None) -> dict[str, Peer]:
    """Peers by name; all that can run here if none are named.

    Raises:
        ConfigError: no such peer.
        MissingExtra: a peer that was named is not installed.
    """
    if names is None:
        return {name: peer for name, peer in PEERS.items() if peer.library == "hcx" or find_spec(peer.library)}
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--peers {name}: no such peer; valid: {', '.join(PEERS)}")
        library = PEERS[name].library
        if library == "llmcompressor" and find_spec(library) is None:
            # Its pins exclude the transformers release that hcx needs; the one function used here does not care.
            raise ConfigError(
                f"--peers {name} needs llmcompressor: pip install --no-deps llmcompressor compressed-tensors loguru"
            )
        if library != "hcx" and find_spec(library) is None:
            raise MissingExtra(library, "quantizers", f"--peers {name}")
    return {name: PEERS[name] for name in names}


def _round(weight: Tensor, statistics: InputStatistics, bits: int, group_size: int) -> Tensor:
    """Asymmetric rounding to nearest with fp16 steps and integer zero points, as everybody does it."""
    groups = _groups(weight, group_size)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    step = ((high - low) / top).half().float().clamp(min=torch.finfo(torch.float16).tiny)
    zero = (-low / step).round()
    codes = ((groups / step).round() + zero).clamp(0, top)
    return ((codes - zero) * step).view_as(weight)


def _hqq(axis: int, weight: Tensor, statistics: InputStatistics, bits: int, group_size: int) -> Tensor:
    """Half-quadratic quantization with its own defaults; needs no inputs."""
    from hqq.core.quantize import Quantizer

    _groups(weight, group_size)
    packed, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group_size, axis=axis, device="cpu", compute_dtype=torch.float32
    )
    for key in ("scale", "zero"):  # what it stores by default
        meta[key] = meta[key].half().float()
    return Quantizer.dequantize(packed, meta).float().view_as(weight)


def _gptq(act_order: bool, weight: Tensor, statistics: InputStatistics, bits: int, group_size: int) -> Tensor:
    """GPTQ as llmcompressor computes it: min-max grids beforehand, columns in their order or by falling activation."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    groups = _groups(weight, group_size)
    arguments = QuantizationArgs(
        num_bits=bits,
        strategy="group",
        group_size=group_size,
        symmetric=False,
        actorder="static" if act_order else None,
    )
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), arguments)
    scale = scale.half().float()
    gram = statistics.gram.clone()
    answer: Any = quantize_weight(weight[None].clone(), gram[None], scale[None], zero[None], None, arguments)
    # Weights, losses, and (in later releases) whether it fell back to rounding.
    if len(answer) > 2 and bool(answer[2].any()):
        raise ConfigError("llmcompressor fell back to rounding: the Gram matrix is singular; calibrate on more tokens")
    return answer[0][0].float()


def _groups(weight: Tensor, group_size: int) -> Tensor:
    if weight.shape[1] % group_size:
        raise ConfigError(
            f"--group-size {group_size} does not divide {weight.shape[1]} inputs, which the other libraries require"
        )
    return weight.view(weight.shape[0], -1, group_size)


PEERS: dict[str, Peer] = {
    "rtn": Peer("hcx", _round, lambda bits: bits),
    "hqq": Peer("hqq", partial(_hqq, 1), lambda bits: 16),
    "hqq-axis0": Peer("hqq", partial(_hqq, 0), lambda bits: 16),
    "gptq": Peer("llmcompressor", partial(_gptq, False), lambda bits: bits),
    "gptq-actorder": Peer("llmcompressor", partial(_gptq, True), lambda bits: bits),
}
"""By the name that `--peers` takes."""
