"""How much the gradient changes when one sublayer's backward is dropped.

`grad_diff` is the paper's quantity, `|| g0 - g_s ||^2`, the gradient variance that dropping s causes. `norm_diff` is
what the authors' code computes by default: `sum over tensors of ( ||g0|| - ||g_s|| )^2`. It needs one number per tensor
instead of a copy of the gradients, and does not see a change of direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hcx.dropbp.masks import Mask
from hcx.model.transforms import GradientSource

Metric = Literal["norm_diff", "grad_diff"]


def measure_sensitivity(
    gradients: GradientSource, use_mask: Callable[[Mask], None], count: int, metric: Metric = "norm_diff", rows: int = 1
) -> list[float]:
    """Sensitivity of each of `count` sublayers, from `count + 1` backward passes over the same rows.

    Args:
        gradients: backward without a step; starts from the same random state at every call.
        use_mask: sets the mask of the following backward passes.
        count: sublayers of the whole model.
        metric: see above.
        rows: how many rows of each replica's batch are used.

    Returns:
        One number per sublayer, accumulated in fp64; NaN where the loss or a gradient was not finite.
    """
    norms: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}

    def remember(name: str, gradient: Tensor) -> None:
        norms[name] = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        if metric == "grad_diff":
            copies[name] = gradient.clone()

    use_mask((False,) * count)
    gradients(remember, rows)
    found = []
    for dropped in range(count):
        differences: list[Tensor] = []

        def compare(name: str, gradient: Tensor, into: list[Tensor] = differences) -> None:
            if metric == "grad_diff":
                into.append((copies[name] - gradient).double().square().sum())
            else:
                into.append((norms[name] - torch.linalg.vector_norm(gradient, dtype=torch.float64)).square())

        use_mask(tuple(index == dropped for index in range(count)))
        gradients(compare, rows)
        found.append(float(torch.stack(differences).sum()))
    return found
