"""`hcx bench decode`: tokens per second of one request, full precision and binary-coded, beside transformers in bf16.

All contenders hold the same shape and read a context of the same length; each makes one token in turn, in one process,
so that a noisy machine disturbs all alike. Speed does not depend on the values of the weights: without a model they are
random.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcx.compress.plan import ModulePlan
from hcx.errors import ConfigError
from hcx.generate.cache import ContiguousKVCache
from hcx.generate.native_step import NativeSteps, why_not_native
from hcx.generate.step import EagerSteps
from hcx.model.config import ModelConfig
from hcx.model.convert.peer import transformers_decoding, transformers_version
from hcx.model.decoder import Decoder
from hcx.model.load import load_model
from hcx.model.parts.base import PlainParts
from hcx.model.parts.sources import BCQSource, DenseSource
from hcx.model.weights import InitWeights, load_weights
from hcx.obs.machine import cpu_name

SMALL = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    tie_embeddings=True,
    max_seq_len=2048,
)
"""The shape of SmolLM2-135M."""


@dataclass(frozen=True)
class DecodeRow:
    """The outcome for one contender; times are of one token. `products` is the share of the time in linear parts."""

    contender: str
    bits: float
    numerics: str
    parameters: int
    context: int
    tokens: int
    ms_p2: float
    ms_p50: float
    tokens_per_s: float
    products: float | None
    device: str
    threads: int
    torch: str
    transformers: str

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Contender:
    name: str
    bits: float
    numerics: str
    step: Callable[[], object]
    decoder: Decoder | None


def measure_decode(
    model: Path | None,
    bits: Sequence[int],
    numerics: str,
    group_size: int,
    context: int,
    tokens: int,
    output_bits: int = 0,
) -> list[DecodeRow]:
    """Times one token of every contender in turns.

    Args:
        model: a full-precision directory; the shape of SmolLM2-135M with random weights if not given.
        bits: planes of the binary-coded contenders.
        numerics: class of their kernels.
        group_size: inputs per scale.
        context: tokens read before the first that is timed.
        tokens: made by each contender.
        output_bits: planes of the output matrix in a second contender of each width; 0: it stays dense in all.

    Raises:
        ConfigError: the model is binary-coded already, or too short for the context.
        MissingExtra: transformers is not installed.
    """
    torch.manual_seed(0)
    config = SMALL if model is None else _shape_of(model)
    if context + tokens + 1 > config.max_seq_len:
        raise ConfigError(f"context {context} and {tokens} tokens exceed the model's {config.max_seq_len}")
    prompt = torch.randint(0, config.vocab_size, (1, context))
    contenders = []
    for name, dtype in (("hcx-fp32", torch.float32), ("hcx-bf16", torch.bfloat16)):
        decoder = _decoder(model, config, dtype)
        contenders.append(
            _Contender(name, 8 * dtype.itemsize, "full", _decoding(EagerSteps(decoder), prompt, tokens, dtype), decoder)
        )
    heads = dict.fromkeys((0, output_bits))
    for planes, head in itertools.product(bits, heads):
        decoder = _decoder(model, config, torch.float32)
        _compress(decoder, ModulePlan(bits=planes, group_size=group_size, method="uniform"), numerics)
        if head:
            plan = ModulePlan(bits=head, group_size=group_size, method="uniform")
            weight = plan.quantize(decoder.output_weight().float()).to_packed()
            decoder.output_source = BCQSource({"output": weight}, numerics)
        name = f"hcx-{planes}bit" + (f"-output{head}" if head else "")
        if why_not_native(decoder) is None:
            step = _decoding(NativeSteps(decoder), prompt, tokens, torch.float32)
            contenders.append(_Contender(name, planes, numerics, step, None))
            name += "-eager"
        step = _decoding(EagerSteps(decoder), prompt, tokens, torch.float32)
        contenders.append(_Contender(name, planes, numerics, step, decoder))
    peer = transformers_decoding(config, torch.bfloat16, prompt)
    contenders.append(_Contender("transformers-bf16", 16, "full", peer, None))

    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(tokens):
        for own, contender in zip(times, contenders, strict=True):
            begun = time.perf_counter()
            contender.step()
            own.append(time.perf_counter() - begun)
    return [
        DecodeRow(
            contender=contender.name,
            bits=contender.bits,
            numerics=contender.numerics,
            parameters=sum(block.numel() for block in _decoder(None, config, torch.float32, "meta").parameters()),
            context=context,
            tokens=tokens,
            ms_p2=round(1e3 * sorted(own)[int(0.02 * tokens)], 3),
            ms_p50=round(1e3 * sorted(own)[tokens // 2], 3),
            tokens_per_s=round(1 / sorted(own)[tokens // 2], 2),
            products=None if contender.decoder is None else round(_share_of_products(contender), 3),
            device=cpu_name(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            transformers=transformers_version(),
        )
        for own, contender in zip(times, contenders, strict=True)
    ]


def _shape_of(model: Path) -> ModelConfig:
    loaded = load_model(model)
    if loaded.quantization is not None:
        raise ConfigError(f"{model} is binary-coded already; hcx bench decode codes a full-precision model itself")
    return loaded.config


def _decoder(model: Path | None, config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> Decoder:
    if model is not None:
        return load_model(model, dtype=dtype).decoder
    decoder = Decoder(config, PlainParts(dtype, device))
    if device != "meta":
        load_weights(decoder, decoder.parameter_map(), InitWeights(config, 0))
    return decoder.requires_grad_(False).eval()


def _compress(decoder: Decoder, plan: ModulePlan, numerics: str) -> None:
    for part in dict.fromkeys(decoder.linears().values()):
        source = part.source
        assert isinstance(source, DenseSource)
        packed = {b.stem: plan.quantize(source.weight[slice(*b.rows)].float()).to_packed() for b in part.blocks}
        part.replace_source(BCQSource(packed, numerics))


def _decoding(steps: EagerSteps, prompt: Tensor, tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Reads the prompt; every call then makes the next token, greedily."""
    decoder, length = steps.decoder, prompt.shape[1]
    # One token more than is timed: the share of products is taken from further ones.
    cache = ContiguousKVCache(decoder.config, 1, length + tokens + EXTRA, dtype)
    hidden = steps.prefill(prompt, torch.arange(length)[None], cache.view(0, 1, length))
    token, position = steps.logits(hidden[-1]).argmax(-1), length

    def step() -> Tensor:
        nonlocal token, position
        logits = steps.decode_step(token, torch.tensor([position]), cache.view(0, 1, position + 1))
        token, position = logits.argmax(-1), position + 1
        return logits

    return step


EXTRA = 12
"""Tokens after the timed ones, to see where the time goes."""


def _share_of_products(contender: _Contender) -> float:
    """The part of a token's time that is spent in weight sources; a dense output matrix counts as outside."""
    assert contender.decoder is not None
    inside, begun = [0.0], [0.0]

    def enter(module: nn.Module, inputs: object) -> None:
        begun[0] = time.perf_counter()

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        inside[0] += time.perf_counter() - begun[0]

    sources: list[nn.Module] = [part.source for part in dict.fromkeys(contender.decoder.linears().values())]
    if contender.decoder.output_source is not None:
        sources.append(contender.decoder.output_source)
    hooks = [hook for s in sources for hook in (s.register_forward_pre_hook(enter), s.register_forward_hook(leave))]
    shares = []
    for _ in range(EXTRA - 1):
        inside[0], start = 0.0, time.perf_counter()
        contender.step()
        shares.append(inside[0] / (time.perf_counter() - start))
    for hook in hooks:
        hook.remove()
    return sorted(shares)[len(shares) // 2]
