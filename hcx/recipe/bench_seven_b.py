"""`hcx bench compress-7b`: a model of 7B shape through `hcx compress`, with its peak memory, and the time of its peers.

Weights are random, the layout is real: the time and the memory of compression do not depend on the values. The model is
written layer by layer, so that making it needs little memory too.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcx.compress import InputStatistics, quantize
from hcx.compress.bcq import coder
from hcx.compress.plan import ModulePlan
from hcx.dist import derived_generator
from hcx.errors import ConfigError, HcxError
from hcx.model.config import ModelConfig
from hcx.model.convert.hf import export_hf
from hcx.model.load import tensor_names
from hcx.obs.machine import cpu_name
from hcx.recipe.compress_peers import find_peers

SEVEN_B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    max_seq_len=4096,
)
"""The shape of Llama 2 7B: 6.7e9 parameters."""
SHARD_BYTES = 512 << 20
"""Of the model's files: the writer holds one of them in memory."""

_CHILD = """
import json, resource, sys, time
import torch
from hcx.compress import CompressPlan, compress_model
torch.set_num_threads(int(sys.argv[4]))
begun = time.perf_counter()
summary = compress_model(sys.argv[1], sys.argv[2], CompressPlan.model_validate_json(sys.argv[3]))
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak_kib": peak, "bits_per_weight": summary.bits_per_weight}))
"""
"""In a process of its own: what was needed to make the model must not count."""


@dataclass(frozen=True)
class CompressRow:
    """The outcome for one contender. Peers quantize the matrices of one block, in memory; their time is scaled up."""

    contender: str
    method: str
    bits: int
    group_size: int
    layers: int
    parameters: int
    seconds: float
    peak_gib: float | None
    bits_per_weight: float | None
    relative_error: float | None
    threads: int
    device: str
    torch: str

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


def write_random_model(directory: Path, config: ModelConfig, seed: int = 0) -> None:
    """Writes a model of random bf16 weights, one tensor at a time."""
    directory.mkdir(parents=True)
    export_hf(directory, config, _tensors(config, seed), dtype=torch.bfloat16, max_shard_bytes=SHARD_BYTES)


def _tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    for name in tensor_names(config):
        shape = _shape(config, name)
        if len(shape) == 1:
            yield name, torch.ones(shape)
        else:
            yield name, torch.randn(shape, generator=derived_generator(seed, "bench", name)).mul_(0.02)


def _shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    hidden, wide = config.hidden_size, config.intermediate_size
    keys = config.kv_heads * config.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj": (config.num_heads * config.head_size, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, config.num_heads * config.head_size),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
    }
    return shapes.get(name.split(".")[-2], (hidden,))


def measure_compress(
    work: Path, layers: int, bits: int, group_size: int, method: str, threads: int, config: ModelConfig = SEVEN_B
) -> list[CompressRow]:
    """Compresses a random model in a process of its own, then times one block's matrices in memory.

    Beside the method itself: its reference in torch, plain rounding, and HQQ.

    Args:
        work: a directory to make the model in, and to remove it from; it needs 2 bytes per parameter and the result's.
        layers: blocks of the model; fewer than the whole shape's make a quicker, smaller run.
        bits: planes.
        group_size: inputs per scale.
        method: of the contender.
        threads: of torch.
        config: the shape, but for the number of blocks.

    Raises:
        ConfigError: the directory exists already.
        HcxError: the compression failed; with its last words.
    """
    if work.exists():
        raise ConfigError(f"--work {work}: already exists; name a new directory, it is removed at the end")
    config = config.model_copy(update={"num_layers": layers})
    parameters = sum(math.prod(_shape(config, name)) for name in tensor_names(config))
    settings = ModulePlan.model_validate({"bits": bits, "group_size": group_size, "method": method})
    try:
        write_random_model(work / "model", config)
        found = _compress(work, settings, threads)
    finally:
        shutil.rmtree(work, ignore_errors=True)

    def row(contender: str, how: str, **values: Any) -> CompressRow:
        usual = {"peak_gib": None, "bits_per_weight": None, "relative_error": None}
        return CompressRow(
            contender=contender,
            method=how,
            bits=bits,
            group_size=group_size,
            layers=layers,
            parameters=parameters,
            threads=threads,
            device=cpu_name(),
            torch=torch.__version__,
            **{**usual, **values},
        )

    rows = [
        row(
            "hcx compress",
            method,
            seconds=round(found["seconds"], 1),
            peak_gib=round(found["peak_kib"] / 2**20, 3),
            bits_per_weight=round(found["bits_per_weight"], 4),
        )
    ]
    plain = ModulePlan.model_validate({"bits": bits, "group_size": group_size, "method": "uniform"})
    contenders: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        ("hcx in memory", method, lambda weight: settings.quantize(weight).dequantize()),
        ("hcx in memory", "uniform", lambda weight: plain.quantize(weight).dequantize()),
    ]
    if method == "alternating" and coder() == "native":
        reference = partial(
            quantize, bits=bits, group_size=group_size, rounds=settings.rounds, offset=settings.offset, reference=True
        )
        contenders.append(("hcx in torch", method, lambda weight: reference(weight).dequantize()))
    peer = _hqq(bits, group_size)
    if peer is not None:
        contenders.append(("hqq", "hqq", peer))
    for name, how, contender in contenders:
        seconds, error = _time_block(config, contender, threads)
        rows.append(row(name, how, seconds=round(seconds * layers, 1), relative_error=round(error, 5)))
    return rows


def _compress(work: Path, settings: ModulePlan, threads: int) -> dict[str, float]:
    plan = json.dumps({"default": settings.model_dump(mode="json")})
    command = [sys.executable, "-c", _CHILD, str(work / "model"), str(work / "out"), plan, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if answer.returncode:
        raise HcxError(f"the compression failed: {answer.stderr.strip().splitlines()[-1:]}")
    values: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return values


def _time_block(config: ModelConfig, quantize: Callable[[Tensor], Tensor], threads: int) -> tuple[float, float]:
    """Seconds for the matrices of a block, and their mean relative error."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds, errors = 0.0, []
    try:
        for name in tensor_names(config.model_copy(update={"num_layers": 1})):
            if not name.endswith("_proj.weight"):
                continue
            weight = torch.randn(_shape(config, name), generator=derived_generator(0, "bench", name)).mul_(0.02)
            begun = time.perf_counter()
            found = quantize(weight)
            seconds += time.perf_counter() - begun
            errors.append(float((found.float() - weight).norm() / weight.norm()))
    finally:
        torch.set_num_threads(before)
    return seconds, sum(errors) / len(errors)


def _hqq(bits: int, group_size: int) -> Callable[[Tensor], Tensor] | None:
    """HQQ's own quantizer on a CPU, or None where the package is not installed or lacks these bits."""
    peer = find_peers().get("hqq")
    if peer is None or bits not in (1, 2, 3, 4, 8):  # the widths that it packs
        return None
    unused = InputStatistics(torch.empty(0, 0), 0)  # HQQ reads no inputs
    return lambda weight: peer.quantize(weight, unused, bits, group_size)
