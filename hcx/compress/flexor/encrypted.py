"""The product of a vector with stored words, without expanding them: one look-up covers a whole slice.

For a slice of inputs `a`, `E[key] = sum_r y_r(key) a_r` over all keys; every output row looks up its own key. So the
words are the only traffic of weights, and a look-up covers `n_out` weights. This is the reference that a kernel in the
encrypted domain has to equal; serving uses planes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hcx.compress.flexor.network import Matrix
from hcx.compress.flexor.transform import all_words


def encrypted_product(words: Matrix, matrix: Matrix, x: Tensor) -> Tensor:
    """`sum_k y_k x_k` for every row, without its scale.

    Args:
        words: uint8 `[out, slices, n_in]`, at most 12 bits per word.
        matrix: the network `[n_out, n_in]`.
        x: `[in]`, of any type that adds exactly; integers give the exact product.

    Returns:
        `[out]`, in the type of `x`.
    """
    n_out, n_in = matrix.shape
    slices = words.shape[1]
    padded = torch.nn.functional.pad(x, (0, slices * n_out - x.shape[0])).view(slices, n_out)
    outputs = torch.from_numpy(2 * ((all_words(n_in) @ matrix.T) & 1).astype(np.int8) - 1).to(x.dtype)
    table = outputs @ padded.t()  # [2^n_in, slices]
    keys = torch.from_numpy(words.astype(np.int64) @ (1 << np.arange(n_in)))  # [out, slices]
    return table.gather(0, keys).sum(1)
