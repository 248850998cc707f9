"""Tiny random models with every option that can go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hcx.model.config import ModelConfig
from hcx.model.convert.hf import export_hf
from hcx.model.decoder import Decoder
from hcx.model.parts.base import PlainParts
from hcx.model.weights import InitWeights, load_weights

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 256,
    # Larger than usual: logits of a random model must differ enough for a comparison to mean something.
    "initializer_range": 0.2,
}
MULTIPLIERS: dict[str, Any] = {
    "attention_multiplier": 0.31,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.125,
    "use_post_norm": True,
}


def tiny_config(architecture: str = "llama", **overrides: Any) -> ModelConfig:
    """Two blocks, grouped queries; `hyperclovax` with every multiplier away from 1 and Peri-LN."""
    extra = MULTIPLIERS if architecture == "hyperclovax" else {}
    return ModelConfig(**{"architecture": architecture, **SIZES, **extra, **overrides})


def tiny_decoder(config: ModelConfig, seed: int = 0, randomize_norms: bool = True) -> Decoder:
    """A random decoder in fp32; norm weights differ from 1, so that a forgotten norm shows."""
    decoder = Decoder(config, PlainParts())
    load_weights(decoder, decoder.parameter_map(), InitWeights(config, seed))
    if randomize_norms:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return decoder


def decoder_tensors(decoder: Decoder) -> dict[str, torch.Tensor]:
    """(canonical name -> tensor) of a decoder on one rank."""
    parameters = dict(decoder.named_parameters())
    return {
        block.name: block.view(parameters[local]).detach().clone()
        for local, blocks in decoder.parameter_map().items()
        for block in blocks
    }


TINY_TEXT = (
    "대한민국의 수도는 서울이다. 서울에는 한강이 흐르고, 많은 사람이 산다.",
    "문서를 열려면 파일 메뉴에서 열기를 누르십시오. 저장하려면 저장을 누르십시오.",
    "The capital of Korea is Seoul. A river flows through the city, and many people live there.",
    "To open a document, choose Open from the File menu. To save it, choose Save.",
    "def add(left, right):\n    return left + right\n\nfor number in range(10):\n    print(add(number, 1))\n",
)


def tiny_model_directory(
    path: str | Path, architecture: str = "llama", with_tokenizer: bool = True, seed: int = 0, **overrides: Any
) -> Path:
    """A random Hugging Face model directory with a small byte-level tokenizer."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(architecture, **overrides)
    if with_tokenizer:
        from hcx.tokenizer import train_tokenizer

        train_tokenizer(TINY_TEXT, vocab_size=config.vocab_size).save(path)
    decoder = tiny_decoder(config, seed)
    export_hf(path, config, decoder_tensors(decoder).items(), tokenizer=path if with_tokenizer else None)
    return path
