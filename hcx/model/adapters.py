"""Low-rank adapters (LoRA, Hu et al. 2021): which linears get one, training them, and merging them into the weights.

`W + (alpha / rank) * B A`, with `A` `[rank, in]` and `B` `[out, rank]`, for each unfused canonical matrix. The base
stays frozen, and may be binary-coded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn

from hcx.config import Config
from hcx.errors import CheckpointError, ConfigError, did_you_mean
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.parts.sources import LoRASource
from hcx.model.transforms import ModelTransform, TransformContext
from hcx.model.weights import TensorWeights, load_weights

LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""The linears of a block, by sublayer."""


class LoRAConfig(Config):
    """Trains low-rank updates of some linears and nothing else."""

    kind: Literal["lora"] = "lora"
    rank: int = 8
    """Rank of each update."""
    alpha: float = 16.0
    """The update is scaled by `alpha / rank`."""
    targets: tuple[str, ...] = tuple(name for names in LINEARS.values() for name in names)
    """Ends of module paths, as in PEFT: `q_proj`, or `layers.0.self_attn.q_proj` for one block's."""
    init_from: str | None = None
    """A PEFT directory whose updates the run starts from; new ones, which change nothing at first, if not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank}; must be at least 1")
        if not self.targets:
            raise ValueError("targets is empty; name at least one linear, such as q_proj")
        return self


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates.

    Attributes:
        rank, alpha: as in `LoRAConfig`.
        targets: ends of the adapted module paths.
        tensors: `STEM.lora_A.weight` and `STEM.lora_B.weight` -> full tensor.
        directory: where it came from.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    directory: Path

    @property
    def stems(self) -> frozenset[str]:
        """Module paths that have an update."""
        return frozenset(name.rpartition(".lora_")[0] for name in self.tensors)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A canonical weight with its update, fp32; the weight itself where it has none."""
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" not in self.tensors:
            return weight
        up, down = self.tensors[f"{stem}.lora_B.weight"].float(), self.tensors[f"{stem}.lora_A.weight"].float()
        return weight.float() + (self.alpha / self.rank) * (up @ down)


def target_stems(targets: Collection[str], model: ModelConfig) -> frozenset[str]:
    """The module paths that end in one of the targets.

    Raises:
        ConfigError: a target ends no module path of the model.
    """
    stems = [
        f"model.layers.{layer}.{sublayer}.{name}"
        for layer in range(model.num_layers)
        for sublayer, names in LINEARS.items()
        for name in names
    ]
    chosen: set[str] = set()
    for target in targets:
        found = {stem for stem in stems if stem == target or stem.endswith(f".{target}")}
        if not found:
            names = [name for group in LINEARS.values() for name in group]
            raise ConfigError(f"adapter.targets: {target!r} names no linear; {did_you_mean(target, names)}")
        chosen |= found
    return frozenset(chosen)


class LoRA(ModelTransform):
    """Freezes the model and puts low-rank updates beside the targeted linears.

    Args:
        config: which, and how large.
        seed: of the initial `A`; `B` starts at zero.
        initial: updates to start from instead.

    Raises:
        ConfigError: `initial` has another rank or scale than `config`.
    """

    def __init__(self, config: LoRAConfig, seed: int, initial: Adapter | None = None) -> None:
        self._config, self._seed, self._initial = config, seed, initial
        if initial is not None and (initial.rank, initial.alpha) != (config.rank, config.alpha):
            raise ConfigError(
                f"adapter.init_from: {initial.directory} has rank {initial.rank} and alpha {initial.alpha:g}, the "
                f"recipe says {config.rank} and {config.alpha:g}; set adapter.rank and adapter.alpha to the former"
            )

    def apply(self, chunk: nn.Module, context: TransformContext) -> None:
        """See `ModelTransform.apply`."""
        chunk.requires_grad_(False)
        stems = target_stems(self._config.targets, context.config)
        if self._initial is not None and self._initial.stems != stems:
            differing = sorted(self._initial.stems ^ stems)
            raise ConfigError(
                f"adapter.init_from: {self._initial.directory} adapts other linears than adapter.targets say: "
                f"{', '.join(differing[:3])} ({len(differing)} in all)"
            )
        _put_beside(
            cast(Decoder, chunk), stems, self._config.rank, self._config.alpha, seed=self._seed, values=self._initial
        )


def attach_adapter(decoder: Decoder, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> None:
    """Computes a loaded model with an adapter's updates, beside its weights of any kind.

    Raises:
        CheckpointError: the adapter is not for a model of this shape.
    """
    known = set(decoder.linears())
    foreign = sorted(adapter.stems - known)
    if foreign:
        raise CheckpointError(
            f"{adapter.directory}: adapts {foreign[0]}, which this model does not have; give the model it was made for"
        )
    _put_beside(decoder, adapter.stems, adapter.rank, adapter.alpha, values=adapter, dtype=dtype, device=device)


def _put_beside(
    decoder: Decoder,
    stems: Collection[str],
    rank: int,
    alpha: float,
    seed: int = 0,
    values: Adapter | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    for part in dict.fromkeys(decoder.linears().values()):
        chosen = [block.stem for block in part.blocks if block.stem in stems]
        if not chosen:
            continue
        source = LoRASource(part.source, part.blocks, rank, alpha, chosen, seed, dtype, device)
        if values is not None:
            updates = {name: slices for name, slices in source.canonical().items() if name.startswith("lora_")}
            load_weights(source, updates, TensorWeights(values.tensors.__getitem__, str(values.directory)))
        part.replace_source(source)
