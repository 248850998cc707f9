"""Sizes of mixed-precision models, with everything counted that is stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

FULL_PRECISION_BITS = 32


@dataclass(frozen=True)
class Component:
    """Weights of one kind.

    Attributes:
        name: what they are.
        weights: how many.
        bits: mean planes per weight; 32 for full precision.
        row: weights that share one scale per plane; None: no scales (full precision).
    """

    name: str
    weights: int
    bits: Fraction
    row: int | None = None

    def stored_bits(self, scale_bits: int = FULL_PRECISION_BITS) -> Fraction:
        """Planes and their scales."""
        scales = 0 if self.row is None else Fraction(scale_bits, self.row)
        return self.weights * self.bits * (1 + scales)


def mean_bits(components: Iterable[Component], scale_bits: int = 0) -> Fraction:
    """Stored bits per weight; of the planes alone if `scale_bits` is 0."""
    parts = list(components)
    return sum((part.stored_bits(scale_bits) for part in parts), Fraction()) / sum(part.weights for part in parts)


def times_smaller(components: Iterable[Component], scale_bits: int = FULL_PRECISION_BITS) -> Fraction:
    """The size in fp32 over the stored size."""
    return FULL_PRECISION_BITS / mean_bits(components, scale_bits)


def shares(components: Iterable[Component]) -> dict[str, Fraction]:
    """Share of the weights by the first word of a component's name."""
    parts = list(components)
    total = sum(part.weights for part in parts)
    found: dict[str, Fraction] = {}
    for part in parts:
        kind = part.name.split()[0]
        found[kind] = found.get(kind, Fraction()) + Fraction(part.weights, total)
    return found


def base_transformer(
    embedding: Fraction, decoder: tuple[int, int, int], encoder: tuple[int, int] | None, true_rows: bool = False
) -> list[Component]:
    """The base translation model of Chung et al. 2020: 512 wide, 2048 inside, 6 + 6 layers, a vocabulary of 32,768.

    Args:
        embedding: mean bits of the shared embedding.
        decoder: bits of self-attention, cross-attention and feed-forward.
        encoder: bits of self-attention and feed-forward; None: full precision.
        true_rows: scales per true row of a matrix (2048 in the second feed-forward matrix); else per 512 weights.
    """
    width, inner, layers = 512, 2048, 6
    square = 4 * width * width * layers
    parts = [Component("embedding", 32_768 * width, embedding, width)]
    for kind, attentions, forward in (
        ("decoder", decoder[:2], decoder[2]),
        ("encoder", encoder[:1] if encoder else (FULL_PRECISION_BITS,), encoder[1] if encoder else FULL_PRECISION_BITS),
    ):
        full = kind == "encoder" and encoder is None
        own = None if full else width
        parts += [Component(f"{kind} attention {i}", square, Fraction(bits), own) for i, bits in enumerate(attentions)]
        half = width * inner * layers
        second = None if full else (inner if true_rows else width)
        parts += [
            Component(f"{kind} forward 1", half, Fraction(forward), own),
            Component(f"{kind} forward 2", half, Fraction(forward), second),
        ]
    return parts
