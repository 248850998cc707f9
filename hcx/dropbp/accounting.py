"""What a mask saves, counted from the decoder's shape: operations of the backward, and activations that are stored.

Operations are per token, a multiplication and an addition each counted, and matrix products only. The backward of a
product costs as much again for the gradient of its input, and as much again for that of its weight if it is trained.
Gradients flow to a weight only through what needs one: below the lowest trained and kept matrix there is no backward at
all, and its own input needs no gradient. Counting follows that, mask by mask, so that the figures are those of a
counter of operations, not of a formula for the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hcx.dropbp.masks import Mask
from hcx.model.adapters import LoRAConfig, target_stems
from hcx.model.config import ModelConfig


@dataclass(frozen=True)
class Trained:
    """What gets gradients: everything, or parts of a frozen model.

    Attributes:
        everything: all weights; the other fields then say nothing.
        matrices: module paths whose matrix gets a gradient, or something that is a sum over that gradient (scales of
            binary codes).
        low_rank: module paths with low-rank updates.
        rank: of the updates.
    """

    everything: bool = True
    matrices: frozenset[str] = frozenset()
    low_rank: frozenset[str] = frozenset()
    rank: int = 0

    @classmethod
    def updates(cls, adapter: LoRAConfig, model: ModelConfig) -> Trained:
        """Low-rank updates on a frozen base."""
        return cls(everything=False, low_rank=target_stems(adapter.targets, model), rank=adapter.rank)


EVERYTHING = Trained()


@dataclass(frozen=True)
class _Product:
    """Linear maps that read the same input: a base, and low-rank updates `(in, rank)` then `(rank, out)`.

    Attributes:
        base: operations of the base, forward.
        base_trained: of those of its matrices that get a gradient.
        down, up: of the updates' two factors.
    """

    base: int
    base_trained: int
    down: int = 0
    up: int = 0

    @property
    def forward(self) -> int:
        return self.base + self.down + self.up

    @property
    def is_trained(self) -> bool:
        return self.base_trained > 0 or self.down > 0

    def backward(self, input_needs_gradient: bool) -> int:
        # Of the factors: both weights, and always the gradient between them.
        weights = self.base_trained + self.down + 2 * self.up
        return weights + (self.base + self.down if input_needs_gradient else 0)


@dataclass(frozen=True)
class SublayerCost:
    """One residual sublayer, per token: `entry` products, a core without weights, an `exit` product.

    Attributes:
        entry: q/k/v, or gate and up.
        core: operations of scores and values, forward; their backward costs twice that.
        exit: o, or down.
        norm_trained: the norm before the entry is trained, so that the entry's input needs a gradient.
        norm_after: Peri-LN's norm after the exit.
        stored: values that autograd keeps for the backward.
        kept_input: values that activation checkpointing keeps.
    """

    entry: _Product
    core: int
    exit: _Product
    norm_trained: bool
    norm_after: bool
    stored: int
    kept_input: int

    @property
    def forward(self) -> int:
        """Operations of the forward pass."""
        return self.entry.forward + self.core + self.exit.forward

    def backward(self, input_needs_gradient: bool = True) -> int:
        """Operations of the backward pass, without recomputation."""
        below = input_needs_gradient or self.norm_trained
        inside = below or self.entry.is_trained
        core = 2 * self.core if inside else 0
        entry = self.entry.backward(below) if inside else 0
        exit_ = self.exit.backward(inside) if inside or self.exit.is_trained else 0
        return entry + core + exit_

    def needs_gradient(self, input_needs_gradient: bool) -> bool:
        """Whether the branch has a backward pass at all."""
        return input_needs_gradient or self.norm_trained or self.entry.is_trained or self.exit.is_trained

    @property
    def recompute(self) -> int:
        """Operations of the recomputation, which stops at the last value that the backward needs."""
        last = 0 if self.norm_after else (self.exit.up or self.exit.base)
        return self.forward - last


@dataclass(frozen=True)
class Saving:
    """What one mask, or the masks of a step, saved.

    Attributes:
        rate: share of the sublayers that were dropped.
        weighted_rate: their share of the sublayers' backward operations.
        forward: operations of the forward per token.
        backward: operations of the backward per token, recomputation included.
        backward_whole: the same if nothing were dropped.
        stored: share of the sublayers' stored activations that was stored.
    """

    rate: float
    weighted_rate: float
    forward: float
    backward: float
    backward_whole: float
    stored: float

    @property
    def flops_saved(self) -> float:
        """Share of the operations of forward and backward."""
        return (self.backward_whole - self.backward) / (self.forward + self.backward_whole)


class StepCosts:
    """Costs of a model's training step at one sequence length.

    Args:
        model: the decoder.
        seq_len: tokens per row.
        trained: what gets gradients.
        checkpointing: kept sublayers are computed again.
        attended: share of all query-key pairs that attention computes: 0.5 for causal kernels, 1 for those that
            compute masked pairs too.
    """

    def __init__(
        self,
        model: ModelConfig,
        seq_len: int,
        trained: Trained = EVERYTHING,
        checkpointing: bool = False,
        attended: float = 0.5,
    ) -> None:
        self.checkpointing = checkpointing
        self._trains_all = trained.everything
        self._head = 2 * model.hidden_size * model.vocab_size
        self.sublayers = tuple(_cost(model, index, seq_len, attended, trained) for index in range(model.num_sublayers))
        self.forward = sum(cost.forward for cost in self.sublayers) + self._head
        nothing = (False,) * len(self.sublayers)
        self.backward_whole, self._stored_whole = self.backward(nothing), self.stored(nothing)

    def backward(self, mask: Mask) -> int:
        """Operations of the backward per token under a mask, recomputation and the head included."""
        flows, total = self._trains_all, 0
        for cost, dropped in zip(self.sublayers, mask, strict=True):
            if dropped or not cost.needs_gradient(flows):
                continue
            total += cost.backward(flows) + (cost.recompute if self.checkpointing else 0)
            flows = True
        return total + self._head * (int(self._trains_all) + int(flows))

    def stored(self, mask: Mask) -> int:
        """Values that the sublayers keep for the backward, per token."""
        flows, total = self._trains_all, 0
        for cost, dropped in zip(self.sublayers, mask, strict=True):
            if dropped or not cost.needs_gradient(flows):
                continue
            total += cost.kept_input if self.checkpointing else cost.stored
            flows = True
        return total

    def weights(self) -> list[float]:
        """What dropping each sublayer saves: the weights of the allocation."""
        return [float(cost.backward() + (cost.recompute if self.checkpointing else 0)) for cost in self.sublayers]

    def saving(self, masks: Sequence[Mask]) -> Saving:
        """What masks of equally many tokens saved, on average."""
        weights = self.weights()
        dropped = sum(sum(mask) for mask in masks)
        weighted = sum(weight for mask in masks for weight, bit in zip(weights, mask, strict=True) if bit)
        return Saving(
            rate=dropped / (len(masks) * len(weights)),
            weighted_rate=weighted / (len(masks) * sum(weights)),
            forward=self.forward,
            backward=sum(self.backward(mask) for mask in masks) / len(masks),
            backward_whole=self.backward_whole,
            stored=sum(self.stored(mask) for mask in masks) / (len(masks) * self._stored_whole),
        )


def _cost(model: ModelConfig, index: int, seq_len: int, attended: float, trained: Trained) -> SublayerCost:
    hidden, dim, inner = model.hidden_size, model.head_size, model.intermediate_size
    query, key = model.num_heads * dim, model.kv_heads * dim
    layer, rank = f"model.layers.{index // 2}", trained.rank

    def product(entries: dict[str, tuple[int, int]]) -> _Product:
        operations = {f"{layer}.{stem}": 2 * out * in_ for stem, (out, in_) in entries.items()}
        base = sum(operations.values())
        if trained.everything:
            return _Product(base, base)
        updated = [shape for stem, shape in entries.items() if f"{layer}.{stem}" in trained.low_rank]
        return _Product(
            base,
            sum(count for stem, count in operations.items() if stem in trained.matrices),
            sum(2 * in_ * rank for _, in_ in updated),
            sum(2 * out * rank for out, _ in updated),
        )

    if index % 2 == 0:
        entry = product(
            {"self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden)}
        )
        exit_ = product({"self_attn.o_proj": (hidden, query)})
        core = round(4 * query * seq_len * attended)
        # q, k, v as one matrix (of which v stays in use), q and k rotated, the result, a normaliser per head.
        stored = 3 * query + 3 * key + model.num_heads
    else:
        entry = product({"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)})
        exit_ = product({"mlp.down_proj": (hidden, inner)})
        # Gate and up as one matrix, the activated gate; and their product where the exit's weight is trained.
        core, stored = 0, 3 * inner + (inner if exit_.is_trained else 0)
    norms = 2 if model.use_post_norm else 1
    # A norm keeps its input and one number; a trained product the norm's output and its low-rank values.
    stored += norms * (hidden + 1) + (hidden if entry.is_trained else 0)
    stored += (entry.down // (2 * hidden)) + (exit_.up // (2 * hidden))
    return SublayerCost(entry, core, exit_, trained.everything, model.use_post_norm, stored, hidden)
