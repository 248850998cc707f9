"""Training with FleXOR on any engine, and what it leaves: planes, or the words they are expanded from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hcx.compress.flexor.config import FlexorConfig
from hcx.compress.flexor.network import Matrix, canonical, canonical_words, draw_network
from hcx.compress.flexor.source import FlexorSource, check_split, expand, scales_are_shared
from hcx.dist import derived_generator
from hcx.errors import CheckpointError, ConfigError
from hcx.kernels import PackedWeight, xor_codes
from hcx.kernels.format import pack_signs
from hcx.model.decoder import Decoder
from hcx.model.parts.sources import DenseSource, LinearBlock, SplitSource, WeightSource
from hcx.model.transforms import EditsMasters, ModelTransform, TransformContext

KEY_DEVIATION = 1e-3
"""Of random keys: near zero, where gradients are largest."""
WINDOW = 2.0
"""Keys beyond this over S have no gradient to speak of."""


@cache
def networks_of(n_in: int, n_out: int, taps: int, planes: int) -> tuple[Matrix, ...]:
    """The networks of a rate: a function of the numbers alone, so they need no storage of their own; all different."""
    return tuple(draw_network(n_in, n_out, taps, seed=plane) for plane in range(planes))


class Flexor(ModelTransform):
    """Replaces the linear layers of the blocks by keys and scales.

    Args:
        config: the recipe's section.
        seed: of random keys.
        warmup_steps: of the learning rate.
    """

    def __init__(self, config: FlexorConfig, seed: int = 0, warmup_steps: int = 0) -> None:
        self._config, self._seed, self._warmup = config, seed, warmup_steps
        self._sources: list[FlexorSource] = []
        self._keys: list[str] = []

    def apply(self, chunk: nn.Module, context: TransformContext) -> None:
        """See `ModelTransform.apply`."""
        for part in dict.fromkeys(cast(Decoder, chunk).linears().values()):
            dense = part.source
            if not isinstance(dense, DenseSource):
                raise ConfigError("flexor: goes on dense weights; remove what replaces them")
            if not any(self._config.n_in_of(block.stem) for block in part.blocks):
                continue
            weight = dense.weight.detach()
            sources = {
                block.stem: self._source(block, weight[slice(*block.rows)].clone().float()) for block in part.blocks
            }
            part.replace_source(SplitSource(sources))
        layers = range(context.config.num_layers)
        names = [stem for layer in layers for stem in _stems(layer) if self._config.n_in_of(stem)]
        self._keys = [f"{stem}.keys.{plane}" for stem in names for plane in range(self._config.planes)]

    def _source(self, block: LinearBlock, weight: Tensor) -> WeightSource:
        config, n_in = self._config, self._config.n_in_of(block.stem)
        if n_in is None:
            return DenseSource(nn.Parameter(weight), [block.alone()])
        networks = networks_of(n_in, config.n_out, config.taps, config.planes)
        group = min(config.group_size, block.global_shape[1])
        check_split(block, config.n_out, group)
        if config.init == "random":
            keys, scales = self._random(block, networks, group)
        else:
            if scales_are_shared(block, group):
                raise ConfigError(
                    f"flexor.init = project with engine.tensor_parallel = {block.tp_size}: {block.stem} has one scale "
                    "for a row of which no rank sees the whole; choose a group_size that divides a rank's inputs"
                )
            keys, scales = project(weight, networks, group, 1.0 / config.steepness[0])
        source = FlexorSource(
            [key.to(weight.device) for key in keys],
            [scale.to(weight.device) for scale in scales],
            networks,
            block.alone(),
            group,
        )
        source.steepness = config.steepness_at(0, self._warmup)
        self._sources.append(source)
        return source

    def _random(
        self, block: LinearBlock, networks: tuple[Matrix, ...], group: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        (rows, columns), (row, column) = block.global_shape, block.offset
        n_out, n_in = networks[0].shape
        groups = 1 if scales_are_shared(block, group) else -(-block.in_features // group)
        keys, scales = [], []
        for plane in range(len(networks)):
            generator = derived_generator(self._seed, "flexor keys", block.stem, plane)
            whole = KEY_DEVIATION * torch.randn(rows, -(-columns // n_out) * n_in, generator=generator)
            start, width = column // n_out * n_in, -(-block.in_features // n_out) * n_in
            keys.append(whole[row : row + block.out_features, start : start + width].clone())
            # Unit gain: the variance of a sum of `planes` signs with this scale is 1 / fan_in.
            scales.append(torch.full((block.out_features, groups), (len(networks) * columns) ** -0.5))
        return keys, scales

    def before_step(self, step: int) -> None:
        """See `ModelTransform.before_step`: S is a function of the step, so a resume cannot get it wrong."""
        for source in self._sources:
            source.steepness = self._config.steepness_at(step, self._warmup)

    def after_step(self, step: int, engine: EditsMasters) -> dict[str, float]:
        """See `ModelTransform.after_step`."""
        s = self._config.steepness_at(step, self._warmup)
        every = self._config.clip_every
        if every and (step + 1) % every == 0:
            bound = WINDOW / s
            engine.edit_masters(self._keys, lambda name, master, state: master.clamp(-bound, bound))
        return {"flexor/steepness": s}

    def state_dict(self) -> dict[str, Any]:
        """See `ModelTransform.state_dict`."""
        return {"config": self._config.model_dump(mode="json")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ModelTransform.load_state_dict`.

        Raises:
            CheckpointError: the keys of the checkpoint belong to other networks, or to another schedule.
        """
        mine = self._config.model_dump(mode="json")
        changed = sorted(key for key in mine if key != "encrypted" and state.get("config", mine).get(key) != mine[key])
        if changed:
            raise CheckpointError(
                f"flexor.{changed[0]} was {state['config'].get(changed[0])} when the checkpoint was written, now "
                f"{mine[changed[0]]}; keep the section"
            )


def _stems(layer: int) -> list[str]:
    from hcx.model.adapters import LINEARS

    return [f"model.layers.{layer}.{sublayer}.{name}" for sublayer, names in LINEARS.items() for name in names]


def all_words(n_in: int) -> Matrix:
    """Every word, `[2^n_in, n_in]`; word `k` is the binary form of `k`, least significant bit first."""
    numbers = np.arange(1 << n_in)
    return ((numbers[:, None] >> np.arange(n_in)) & 1).astype(np.uint8)


def project(
    weight: Tensor, networks: tuple[Matrix, ...], group_size: int, magnitude: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The nearest code words of a weight, plane after plane, by trying every key of every slice.

    Args:
        weight: `[out, in]`.
        networks: one per plane.
        group_size: inputs per scale.
        magnitude: of the keys.

    Returns:
        Keys and least-squares scales, one per plane.
    """
    out_features, in_features = weight.shape
    rest = weight.float()
    keys, scales = [], []
    for matrix in networks:
        n_out, n_in = matrix.shape
        words = torch.from_numpy(all_words(n_in))
        outputs = torch.from_numpy((all_words(n_in) @ matrix.T) & 1).float() * 2 - 1
        pad = -in_features % n_out
        slices = torch.nn.functional.pad(rest, (0, pad)).view(-1, n_out)
        best = torch.cat([(part @ outputs.t()).argmax(1) for part in slices.split(1 << 14)])
        key = (words[best].float() * 2 - 1) * magnitude
        keys.append(key.view(out_features, -1))
        signs = expand(keys[-1], matrix, in_features, 1.0)
        fill = -in_features % group_size
        products = torch.nn.functional.pad(rest * signs, (0, fill)).unflatten(1, (-1, group_size)).sum(-1)
        sizes = torch.full((products.shape[1],), float(group_size))
        sizes[-1] = group_size - fill
        scales.append(products / sizes)
        rest = rest - signs * scales[-1].repeat_interleave(group_size, 1)[:, :in_features]
    return keys, scales


def packed_of(
    config: FlexorConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, PackedWeight], dict[str, tuple[Tensor, dict[str, Any]]]]:
    """Planes of trained keys and scales, and the words that they are expanded from.

    Args:
        config: as trained.
        tensors: canonical name -> full tensor.
        shapes: module -> shape of its weight.

    Returns:
        Module -> packed weight, and module -> (codes, entry `encoding`); the latter is empty without `encrypted`.
    """
    packed, encoded = {}, {}
    for stem, shape in shapes.items():
        n_in = config.n_in_of(stem)
        if n_in is None:
            continue
        networks = networks_of(n_in, config.n_out, config.taps, config.planes)
        keys = [tensors[f"{stem}.keys.{plane}"] for plane in range(config.planes)]
        scales = [tensors[f"{stem}.scales.{plane}"].float() for plane in range(config.planes)]
        signs = [expand(key, matrix, shape[1], 1.0) > 0 for key, matrix in zip(keys, networks, strict=True)]
        packed[stem] = PackedWeight(
            planes=torch.stack([pack_signs(sign) for sign in signs]),
            scales=torch.stack(scales),
            offset=None,
            in_features=shape[1],
            group_size=min(config.group_size, shape[1]),
        )
        if config.encrypted:
            encoded[stem] = encode_keys(keys, networks)
    return packed, encoded


def encode_keys(keys: Iterable[Tensor], networks: Iterable[Matrix]) -> tuple[Tensor, dict[str, Any]]:
    """Code words uint8 `[q, bytes]` and the entry `encoding`; one bit per component of a network is saved."""
    codes, smaller = [], []
    for key, matrix in zip(keys, networks, strict=True):
        words = (key >= 0).cpu().numpy().astype(np.uint8).reshape(-1, matrix.shape[1])
        reduced, found = canonical(matrix)
        smaller.append(reduced)
        codes.append(torch.from_numpy(xor_codes.pack_words(canonical_words(words, found) if found else words)))
    return torch.stack(codes), xor_codes.describe(smaller)
