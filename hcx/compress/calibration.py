"""What the linear layers of a model read on real text, gathered block by block.

Only one block is held at a time, beside the hidden states of the calibration text at its input: memory is a block's
weights, `tokens x hidden` numbers, and the Gram matrices of one block. A block's layers are quantized in the order in
which they compute, each with inputs that went through the ones quantized before it (GPTQ's reference code does so
within a block; here over blocks too), so later layers make up for earlier errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from hcx.compress.scaling import ScaleSearch, fold_scales
from hcx.data.batch import MicroBatch
from hcx.errors import DataError
from hcx.kernels import PackedWeight
from hcx.kernels.masked import EncodedWeight, MaskedWeight
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.parts.base import PlainParts
from hcx.model.parts.linear import LinearPart
from hcx.model.parts.sources import DenseSource
from hcx.model.weights import TensorWeights, load_weights

ReadTensor = Callable[[str], Tensor]
"""Reads one canonical tensor by name."""
Quantized = PackedWeight | MaskedWeight | EncodedWeight
QuantizeLinear = Callable[[str, Tensor, "InputStatistics"], Quantized | Tensor | None]
"""(stem, weight fp32 `[out, in]`, statistics of its inputs) -> what is stored, the changed dense weight, or None."""


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of what a linear layer reads.

    Attributes:
        gram: fp32 `[in, in]`, mean of `x x^T`.
        tokens: how many inputs it is the mean of.
    """

    gram: Tensor
    tokens: int

    @property
    def moments(self) -> Tensor:
        """`[in]`: mean of `x^2`, the importance of a column."""
        return self.gram.diagonal()


class _Accumulator:
    """Sums `x x^T` over batches, positions of weight 0 left out."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor, counted: Tensor) -> None:
        """`x [seq, batch, in]`, `counted [seq, batch]`."""
        rows = x[counted].float()
        self.total = rows.t() @ rows if self.total is None else self.total.addmm_(rows.t(), rows)
        self.tokens += len(rows)

    def statistics(self) -> InputStatistics:
        if self.total is None or self.tokens == 0:
            raise DataError("the calibration text has no tokens")
        return InputStatistics(self.total / self.tokens, self.tokens)


class _Reached(Exception):
    """Ends a forward pass where the inputs of interest have been seen."""


class BlockWalk:
    """Runs a model one block at a time over a calibration text.

    Args:
        config: the model's shape.
        read: gives its canonical tensors.
        batches: the calibration text; positions of weight 0 do not count.

    Attributes:
        layer: the next block.
        hidden: of each batch, `[seq, batch, hidden]` at the input of the next block.
    """

    def __init__(self, config: ModelConfig, read: ReadTensor, batches: Sequence[MicroBatch]) -> None:
        if not batches or not any(bool((batch.weights > 0).any()) for batch in batches):
            raise DataError("the calibration text has no tokens")
        self.config, self._weights = config, TensorWeights(read, "the model")
        self._metas = [ForwardMeta(positions=b.positions, document_ids=b.document_ids) for b in batches]
        self._counted = [(b.weights > 0).t() for b in batches]
        self.layer = 0
        with torch.no_grad():
            embedding = self._stage(range(0), pre=True)
            self.hidden = [embedding(b.tokens, meta) for b, meta in zip(batches, self._metas, strict=True)]

    def _stage(self, layers: range, pre: bool = False) -> Decoder:
        stage = Decoder(self.config, PlainParts(), layers=layers, pre=pre, post=False)
        load_weights(stage, stage.parameter_map(), self._weights)
        return stage.requires_grad_(False).eval()

    def block(self) -> Decoder:
        """The next block, with its weights, as a decoder stage of its own."""
        return self._stage(range(self.layer, self.layer + 1))

    @torch.no_grad()
    def statistics(self, block: Decoder, parts: Sequence[LinearPart], advance: bool = False) -> list[InputStatistics]:
        """Of the inputs of some linear parts of a block, over the whole calibration text; in one pass.

        Args:
            block: the next one.
            parts: in the order in which the block runs them.
            advance: whether that pass takes the hidden states through the block, too; else it ends at the last part.
        """
        found = [_Accumulator() for _ in parts]
        counted: list[Tensor] = []
        made: list[Tensor] = []

        def watch(index: int) -> Any:
            def see(module: Any, arguments: tuple[Tensor, ...]) -> None:
                found[index].add(arguments[0], counted[0])
                if index == len(parts) - 1 and not advance:
                    raise _Reached

            return see

        handles = [part.register_forward_pre_hook(watch(index)) for index, part in enumerate(parts)]
        try:
            for hidden, meta, mask in zip(self.hidden, self._metas, self._counted, strict=True):
                counted[:] = [mask]
                with contextlib.suppress(_Reached):
                    made.append(block(hidden, meta))
        finally:
            for handle in handles:
                handle.remove()
        if advance:
            self.hidden = made
            self.layer += 1
        return [one.statistics() for one in found]

    @torch.no_grad()
    def advance(self, block: Decoder) -> None:
        """Takes the hidden states through a block, as it now is."""
        self.hidden = [block(hidden, meta) for hidden, meta in zip(self.hidden, self._metas, strict=True)]
        self.layer += 1


def linear_parts(block: Decoder) -> list[LinearPart]:
    """The linear parts of a block, in the order in which they compute."""
    return list(dict.fromkeys(block.linears().values()))


def collect(
    config: ModelConfig, read: ReadTensor, batches: Sequence[MicroBatch]
) -> Iterator[tuple[str, InputStatistics]]:
    """Statistics of the inputs of every linear layer of a full-precision model, block after block.

    Args:
        config: the model's shape.
        read: gives its canonical tensors.
        batches: the calibration text.

    Yields:
        (stem, statistics); stems of one fused part share theirs. Drop them before going on, to bound the memory.
    """
    walk = BlockWalk(config, read, batches)
    for _ in range(config.num_layers):
        block = walk.block()
        parts = linear_parts(block)
        for part, statistics in zip(parts, walk.statistics(block, parts, advance=True), strict=True):
            for one in part.blocks:
                yield one.stem, statistics


@dataclass
class BlockResult:
    """What became of a block.

    Attributes:
        packed: stem -> packed weight.
        dense: canonical name -> tensor that is kept dense but changed (scales were folded into it).
        errors: stem -> relative squared error of the layer's outputs.
        weight_errors: stem -> `|W - W'|_F / |W|_F`, of the weight after scales were folded in.
    """

    packed: dict[str, Quantized] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    weight_errors: dict[str, float] = field(default_factory=dict)


class Calibrator:
    """Quantizes a model block after block with the statistics of what each layer reads.

    Args:
        config: the model's shape.
        read: gives its canonical tensors.
        batches: the calibration text.
        quantize: what becomes of one weight.
        scaling: searches scales per input channel first, and folds them into what comes before; None: does not.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: ReadTensor,
        batches: Sequence[MicroBatch],
        quantize: QuantizeLinear,
        scaling: ScaleSearch | None = None,
    ) -> None:
        self._walk = BlockWalk(config, read, batches)
        self._quantize, self._scaling = quantize, scaling

    @property
    def layer(self) -> int:
        """The block that comes next."""
        return self._walk.layer

    def skip(self, changed: Mapping[str, Tensor]) -> None:
        """Passes over the next block, which is already quantized (after an interruption).

        Args:
            changed: canonical name -> dense tensor as the block now computes with it; what is missing is as it was.
        """
        block = self._walk.block()
        parameters = dict(block.named_parameters())
        with torch.no_grad():
            for local, slices in block.parameter_map().items():
                for one in slices:
                    if one.name in changed:
                        one.view(parameters[local]).copy_(changed[one.name])
        self._walk.advance(block)

    @torch.no_grad()
    def next_block(self) -> BlockResult:
        """Quantizes the next block."""
        block, result = self._walk.block(), BlockResult()
        parts = linear_parts(block)
        if self._scaling is not None:
            before = self._walk.statistics(block, parts)
            result.dense.update(fold_scales(block, parts, [one.gram for one in before], self._scaling))
            del before
        for part in parts:
            (statistics,) = self._walk.statistics(block, [part])
            weight = cast("DenseSource", part.source).weight
            for one in part.blocks:
                own = weight[one.rows[0] : one.rows[1]]
                found = self._quantize(one.stem, own.float().clone(), statistics)
                name = f"{one.stem}.weight"
                if found is None:
                    continue
                result.dense.pop(name, None)
                if isinstance(found, Tensor):
                    result.dense[name] = dense = found
                else:
                    result.packed[one.stem] = found
                    dense = found.dequantize()
                rest = (dense - own).double()
                scale = float(((own.double() @ statistics.gram.double()) * own).sum())
                lost = float(((rest @ statistics.gram.double()) * rest).sum())
                result.errors[one.stem] = lost / scale if scale else 0.0
                norm = float(own.norm())
                result.weight_errors[one.stem] = float(rest.norm()) / norm if norm else 0.0
                own.copy_(dense)
        self._walk.advance(block)
        return result
