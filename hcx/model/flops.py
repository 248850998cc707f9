"""Floating-point operations of the decoder, counted from its shape."""

from __future__ import annotations

import time

import torch

from hcx.model.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, tied embeddings once."""
    norms = config.hidden_size * ((4 if config.use_post_norm else 2) * config.num_layers + 1)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return config.num_layers * matrix_parameters_per_layer(config) + embeddings + norms


def matrix_parameters_per_layer(config: ModelConfig) -> int:
    """Parameters of one block's seven matrices."""
    hidden, dim = config.hidden_size, config.head_size
    attention = hidden * dim * (2 * config.num_heads + 2 * config.kv_heads)
    return attention + 3 * hidden * config.intermediate_size


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Operations of forward and backward per token: `3 (2 P + 2 S H D L)`.

    P: parameters that multiply (matrices and the output, not the embedding's look-up); S H D L: scores and values of
    causal attention over half a sequence of S on average, for H heads of D in L blocks. The backward is counted as
    twice the forward.
    """
    multiplied = config.num_layers * matrix_parameters_per_layer(config) + config.vocab_size * config.hidden_size
    attention = 2 * seq_len * config.num_heads * config.head_size * config.num_layers
    return 3.0 * (2 * multiplied + attention)


# Dense bf16 peaks as published by the maker, FLOP/s.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that utilisation is measured against.

    A GPU: the published dense peak of its kind, 0 if unknown. A CPU has no published figure: the rate of a large matrix
    product in `dtype`, measured here in about 0.2 s.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for kind, peak in _PEAKS.items() if kind in name), 0.0)
    size = 768
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    left @ right
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        left @ right
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - start)
