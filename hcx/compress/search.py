"""Non-convex search of clipping and rounding, layer by layer, driven by the task loss (in the style of Q-Rater).

With all earlier layers quantized and frozen and all later ones in full precision, the knobs of one layer are searched
by the loss of the whole model, frozen, and the next layer follows (Kim et al., arXiv 2105.01868, abstract). Curve,
grids and the order of the search are this project's.

Such a greedy descent is not monotone over layers, and it can overfit its text: at the end the searched model, plain
rounding, the clip of least squared error and (where the search has a damping) that clip with the usual error feedback
are compared on text that no search has seen, and the best is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hcx.compress.feedback import DAMPING
from hcx.compress.rounding import PLAIN, ErrorShares, Knobs, RoundedWeight, mse_knobs, round_weight
from hcx.compress.search_study import STRICT, WEIGHT_GRIDS, Acceptance, Sampler, Trial, accepted, search_layer
from hcx.compress.text_reader import Losses, Objective, ScoredRow, TextReader, by_domain
from hcx.data.batch import MicroBatch
from hcx.errors import ConfigError, DataError
from hcx.kernels import PackedWeight
from hcx.model.decoder import Decoder
from hcx.model.parts.sources import DenseSource

Start = Literal["least_squares", "rounding"]


class SearchTarget(Protocol):
    """A model whose layers are quantized one after another."""

    names: Sequence[str]
    """Its layers, in the order of the forward pass."""

    def begin(self, name: str) -> None:
        """All layers before this one are frozen from now on: what they compute may be kept."""

    def put(self, name: str, knobs: Knobs | None) -> None:
        """Quantizes a layer with these knobs, or puts its full-precision weight back."""

    def losses(self) -> Losses:
        """The task loss of the model as it is, on the text that searches see."""

    def last_rows(self) -> Sequence[float]:
        """Of each row of that text, at the last call of `losses`; empty where rows are not known."""

    def held_out_losses(self) -> Losses:
        """The task loss on text that no search sees."""

    def least_squares(self, name: str) -> Knobs:
        """The knobs with the smallest squared error of the weight."""


@dataclass
class SearchOutcome:
    """What the search found, and what is kept.

    Attributes:
        chosen: `searched`, `error feedback`, `least squares` or `rounding`: the best on held-out text.
        candidates: each of them -> the knobs of every layer.
        held_out: candidate -> held-out losses by domain.
        trials: layer -> every evaluation, in order.
    """

    chosen: str
    candidates: dict[str, dict[str, Knobs]]
    held_out: dict[str, Losses]
    trials: dict[str, list[Trial]] = field(default_factory=dict)

    @property
    def knobs(self) -> dict[str, Knobs]:
        """Of every layer of what was chosen."""
        return self.candidates[self.chosen]

    @property
    def evaluations(self) -> int:
        """Of the task loss, over all layers."""
        return sum(len(found) for found in self.trials.values())


def search_layers(
    target: SearchTarget,
    grids: Mapping[str, Sequence[float]] = WEIGHT_GRIDS,
    rounds: int = 2,
    sampler: Sampler = "coordinate",
    rule: Acceptance = STRICT,
    directory: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    start: Start = "rounding",
) -> SearchOutcome:
    """Searches every layer of a model in the order of the forward pass; see `search_layer` for the other arguments.

    What comes out is never worse than plain rounding of every layer, on held-out text.

    Args:
        target: the model.
        grids: with an axis `damping`, the usual error feedback takes part in the choice at the end.
        start: where each layer's search begins: at plain rounding, or at its clip of least squared error.
    """
    trials: dict[str, list[Trial]] = {}
    searched: dict[str, Knobs] = {}
    for name in target.names:
        target.begin(name)

        def loss(knobs: Knobs, name: str = name) -> Losses:
            target.put(name, knobs)
            return target.losses()

        trials[name] = search_layer(
            name,
            loss,
            start=target.least_squares(name) if start == "least_squares" else PLAIN,
            grids=grids,
            rounds=rounds,
            sampler=sampler,
            rule=rule,
            directory=directory,
            # A layer's losses depend on what was frozen before it.
            settings={**(settings or {}), "frozen": _digest(searched)},
            seed=seed,
            rows=target.last_rows,
        )
        searched[name] = accepted(trials[name], rule)[-1].knobs
        target.put(name, searched[name])
        if progress is not None:
            progress(name)
    clipped = {name: target.least_squares(name) for name in target.names}
    candidates = {"searched": searched, "least squares": clipped, "rounding": dict.fromkeys(target.names, PLAIN)}
    if "damping" in grids:
        candidates["error feedback"] = {name: replace(knobs, damping=DAMPING) for name, knobs in clipped.items()}
    held_out: dict[str, Losses] = {}
    target.begin(target.names[0])
    for candidate, knobs in candidates.items():
        put_all(target, knobs)
        held_out[candidate] = target.held_out_losses()
    chosen = min(candidates, key=lambda one: _mean(held_out[one]))
    put_all(target, candidates[chosen])
    return SearchOutcome(chosen, candidates, held_out, trials)


def put_all(target: SearchTarget, knobs: Mapping[str, Knobs]) -> None:
    """Quantizes every layer."""
    for name in target.names:
        target.put(name, knobs[name])


def _mean(losses: Losses) -> float:
    mean = sum(losses.values()) / len(losses)
    return mean if math.isfinite(mean) else math.inf


def _digest(searched: Mapping[str, Knobs]) -> str:
    return hashlib.sha256(repr(sorted(searched.items())).encode()).hexdigest()[:16]


class DecoderTarget:
    """A decoder and its calibration text: mean next-token loss by language.

    The hidden states at the input of the current block are kept, so an evaluation costs only what comes after.

    Args:
        decoder: full precision, dense; changed in place.
        stems: the linear layers to quantize; any order.
        bits, group_size: of a layer by its stem.
        text: what searches see.
        held_out: what they do not.
        objective: what `losses` are.
        grams: mean of `x x^T` over what each layer reads, by its stem; needed where knobs have a damping.
    """

    def __init__(
        self,
        decoder: Decoder,
        stems: Sequence[str],
        bits: Callable[[str], int],
        group_size: Callable[[str], int],
        text: Sequence[MicroBatch],
        held_out: Sequence[MicroBatch],
        objective: Objective = "loss",
        grams: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not text or not held_out:
            raise DataError("the search needs text to search on, and other text to compare on at the end")
        self._decoder, self._bits, self._group_size = decoder, bits, group_size
        order = {stem: place for place, stem in enumerate(decoder.linears())}
        self.names: Sequence[str] = sorted(stems, key=lambda stem: (int(stem.split(".")[2]), order[stem]))
        self._dense = {stem: self._weight(stem).detach().clone() for stem in self.names}
        self._seen, self._unseen = (TextReader(decoder, part, objective) for part in (text, held_out))
        self._last: list[float] = []
        self._grams = grams or {}
        self._shares: dict[tuple[str, float], ErrorShares] = {}

    def begin(self, name: str) -> None:
        """Takes the kept hidden states to the block of this layer."""
        self._seen.keep(int(name.split(".")[2]))

    @torch.no_grad()
    def put(self, name: str, knobs: Knobs | None) -> None:
        """See `SearchTarget.put`."""
        dense = self._dense[name]
        self._weight(name).copy_(dense if knobs is None else self.rounded(name, knobs).dense())

    def losses(self) -> Losses:
        """See `SearchTarget.losses`."""
        rows = self._seen.rows()
        self._last = [row.nats / row.tokens for row in rows]
        return by_domain(rows)

    def last_rows(self) -> Sequence[float]:
        """See `SearchTarget.last_rows`."""
        return self._last

    def held_out_losses(self) -> Losses:
        """See `SearchTarget.held_out_losses`."""
        self._unseen.keep(0)
        return by_domain(self._unseen.rows())

    def least_squares(self, name: str) -> Knobs:
        """See `SearchTarget.least_squares`."""
        return mse_knobs(self._dense[name], self._bits(name), self._group_size(name))

    def rounded(self, name: str, knobs: Knobs) -> RoundedWeight:
        """A layer's codes and steps."""
        shares = None if knobs.damping is None else self._shares_of(name, knobs.damping)
        return round_weight(self._dense[name], self._bits(name), self._group_size(name), knobs, shares=shares)

    def packed(self, knobs: Mapping[str, Knobs]) -> dict[str, PackedWeight]:
        """Every layer in the packed format."""
        return {name: self.rounded(name, knobs[name]).packed() for name in self.names}

    def full_forward_losses(self) -> Losses:
        """The same losses by whole forward passes of the decoder; what `losses` must equal."""
        return by_domain(self._seen.whole_rows())

    def score_rows(self, text: Sequence[MicroBatch]) -> list[ScoredRow]:
        """The task loss of each row of any text with the decoder as it is now."""
        return TextReader(self._decoder, text).rows()

    def _shares_of(self, name: str, damping: float) -> ErrorShares:
        if name not in self._grams:
            raise ConfigError(f"damping = {damping}: there is no Gram matrix of what {name} reads")
        if (name, damping) not in self._shares:
            # Those of one layer are asked for again and again, and never again once it is frozen.
            self._shares = {key: kept for key, kept in self._shares.items() if key[0] == name}
            self._shares[name, damping] = ErrorShares.of(self._grams[name], damping)
        return self._shares[name, damping]

    def _weight(self, stem: str) -> Tensor:
        part = self._decoder.linears()[stem]
        block = next(one for one in part.blocks if one.stem == stem)
        assert isinstance(part.source, DenseSource)
        return part.source.weight[block.rows[0] : block.rows[1]]
