"""`hcx bench digits`: FleXOR's bits per weight against accuracy on scikit-learn's handwritten digits (8 x 8 pixels).

A perceptron with two hidden layers; the square matrix between them is FleXOR's, first and last layer stay dense, as
published (arXiv 2009.04126). Beside it the same network dense, and with one binary plane trained straight through.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hcx.compress.bcq import quantize
from hcx.compress.flexor.network import draw_network
from hcx.compress.flexor.source import dense_weight
from hcx.errors import ConfigError, MissingExtra

N_OUT = 10
RATES: tuple[tuple[int, int], ...] = ((1, 4), (1, 6), (1, 8), (1, 10), (2, 6))
"""(planes, stored bits of 10 weights): 0.4, 0.6, 0.8, 1.0 and 1.2 bits per weight."""
TAPS = 2
KEY_SPREAD = 0.001
"""Standard deviation of new keys; any small one: only their signs are used."""
STEEPNESS = 10.0
PIXELS, CLASSES, TEST_SHARE = 64, 10, 0.25


@dataclass(frozen=True)
class DigitsRow:
    """A method's accuracy on images that were not trained on.

    Attributes:
        method: `dense`, `1-bit codes` or `FleXOR`.
        bits: per weight of the matrix between the hidden layers, scales not counted.
        matrix_bytes: of that matrix, fp32 scales counted.
        accuracies: one per seed.
    """

    method: str
    bits: float
    matrix_bytes: float
    accuracies: tuple[float, ...]

    def as_dict(self) -> dict[str, str | float]:
        """For CSV."""
        values = self.accuracies
        return {
            "method": self.method,
            "bits_per_weight": self.bits,
            "matrix_bytes": self.matrix_bytes,
            "seeds": len(values),
            "accuracy": statistics.mean(values),
            "lowest": min(values),
            "highest": max(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        }


class _Dense(nn.Module):
    """`[width, width]`, as it is or as one binary plane with a scale per row, the gradient given straight through."""

    def __init__(self, width: int, coded: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(width, width)))
        self.coded = coded

    def forward(self) -> Tensor:
        if not self.coded:
            return self.weight
        with torch.no_grad():
            used = quantize(self.weight, 1, self.weight.shape[1], scale_dtype=torch.float32).dequantize(torch.float32)
        return self.weight + (used - self.weight).detach()


class _Flexor(nn.Module):
    """`[width, width]` out of keys."""

    def __init__(self, width: int, planes: int, n_in: int, seed: int) -> None:
        super().__init__()
        self.networks = [draw_network(n_in, N_OUT, TAPS, seed + plane) for plane in range(planes)]
        slices = -(-width // N_OUT)
        self.width = width
        self.keys = nn.ParameterList(KEY_SPREAD * torch.randn(width, slices * n_in) for _ in range(planes))
        gain = (2 / width / planes) ** 0.5
        self.scales = nn.ParameterList(torch.full((width, 1), gain) for _ in range(planes))

    def forward(self) -> Tensor:
        return dense_weight(list(self.keys), list(self.scales), self.networks, self.width, self.width, STEEPNESS)


def measure_digits(seeds: Sequence[int] = (0, 1, 2), width: int = 240, epochs: int = 40) -> list[DigitsRow]:
    """Trains every method with every seed.

    Args:
        seeds: of weights, batches and the division into training and test images.
        width: of the hidden layers; a multiple of 10, so that no slice is cut.
        epochs: passes over the training images.

    Raises:
        ConfigError: the width does not divide into slices, or there are no seeds.
        MissingExtra: scikit-learn is not installed.
    """
    if width % N_OUT or width < N_OUT or not seeds:
        raise ConfigError(
            f"width = {width}, {len(seeds)} seeds; the width must be a multiple of {N_OUT}, seeds not none"
        )
    images, labels = _digits()
    scale_bytes = 4 * width

    def row(method: str, bits: float, planes: int, matrix: Callable[[int], nn.Module]) -> DigitsRow:
        found = tuple(_accuracy(images, labels, matrix, width, seed, epochs) for seed in seeds)
        return DigitsRow(method, bits, bits * width * width / 8 + planes * scale_bytes, found)

    rows = [
        row("dense", 32, 0, lambda seed: _Dense(width, False)),
        row("1-bit codes", 1, 1, lambda seed: _Dense(width, True)),
    ]
    for planes, n_in in RATES:
        bits = planes * n_in / N_OUT
        rows.append(row("FleXOR", bits, planes, lambda seed, p=planes, n=n_in: _Flexor(width, p, n, seed)))  # type: ignore[misc]
    return rows


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise MissingExtra("scikit-learn", "eval", "hcx bench digits") from None
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16 - 0.5, torch.tensor(found.target)


def _accuracy(
    images: Tensor, labels: Tensor, matrix: Callable[[int], nn.Module], width: int, seed: int, epochs: int
) -> float:
    """Share of the test images that a network trained on the others gets right."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        held_out = round(TEST_SHARE * len(images))
        test, train = order[:held_out], order[held_out:]
        first, last, between = nn.Linear(PIXELS, width), nn.Linear(width, CLASSES), matrix(seed)
        norms = nn.LayerNorm(width), nn.LayerNorm(width)

        def forward(x: Tensor) -> Tensor:
            hidden = F.relu(norms[0](first(x)))
            return last(F.relu(norms[1](F.linear(hidden, between()))))

        parameters = [p for module in (first, last, between, *norms) for p in module.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for batch in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                F.cross_entropy(forward(images[batch]), labels[batch]).backward()
                optimizer.step()
            schedule.step()
        with torch.no_grad():
            return float((forward(images[test]).argmax(-1) == labels[test]).float().mean())
