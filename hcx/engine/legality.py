"""Which engine layouts a model and a number of processes allow, and the nearest legal value where one is not.

Free of torch, so that `hcx plan`, `--dry-run` and the recipe checks answer at once on a laptop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.errors import ConfigError
from hcx.model.config import ModelConfig


@dataclass(frozen=True)
class Violation:
    """One rule that a layout breaks.

    Attributes:
        key: the setting, relative to the recipe.
        value: what was asked for.
        reason: why it cannot be.
        nearest: the closest value that obeys this rule, or None where another setting must change.
    """

    key: str
    value: Any
    reason: str
    nearest: Any = None

    def __str__(self) -> str:
        hint = "" if self.nearest is None else f"; nearest legal value: {_yaml(self.nearest)}"
        return f"{self.key} = {_yaml(self.value)}: {self.reason}{hint}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted`; the smaller of two equally close ones."""
    divisors = [candidate for candidate in range(1, number + 1) if number % candidate == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))


def violations(
    engine: TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig,
    model: ModelConfig,
    world_size: int,
    seq_len: int | None = None,
) -> list[Violation]:
    """Every rule that `engine` breaks for this model on `world_size` processes; empty: legal.

    `seq_len` is the number of tokens in a row of a micro-batch, where it is known already.
    """
    found = list(_replicas(engine, world_size))
    if isinstance(engine, MegatronEngineConfig):
        found += _tensor_parallel(engine, model, seq_len)
        found += _pipeline_parallel(engine, model)
    if engine.missing_gradients == "skip" and not isinstance(engine, TorchEngineConfig):
        found.append(
            Violation(
                "engine.missing_gradients",
                "skip",
                f"{engine.kind} keeps gradients in flat buffers, where a missing gradient is a zero one",
                "zero",
            )
        )
    if engine.compile and not isinstance(engine, TorchEngineConfig):
        found.append(
            Violation(
                "engine.compile",
                True,
                f"{engine.kind} communicates inside the sublayers, which is not traced",
                False,
            )
        )
    if isinstance(engine, DeepSpeedEngineConfig) and engine.precision == "bf16" and engine.zero_stage < 2:
        found.append(
            Violation(
                "engine.zero_stage",
                engine.zero_stage,
                "with bf16 the library gives stages 0 and 1 other optimizers, without fp32 masters or out of reach",
                2,
            )
        )
    return found


def require_legal(
    engine: TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig,
    model: ModelConfig,
    world_size: int,
    seq_len: int | None = None,
) -> None:
    """Raises ConfigError with every violation, its reason and the nearest legal value."""
    found = violations(engine, model, world_size, seq_len)
    if found:
        raise ConfigError("\n".join(str(violation) for violation in found))


def _replicas(
    engine: TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig, world_size: int
) -> Iterator[Violation]:
    ranks = engine.tensor_parallel * engine.pipeline_parallel if isinstance(engine, MegatronEngineConfig) else 1
    if world_size % ranks:
        yield Violation(
            "engine",
            f"tensor_parallel x pipeline_parallel = {ranks}",
            f"does not divide the {world_size} processes of the run; start a multiple of {ranks}",
        )
    elif engine.data_parallel is not None and engine.data_parallel * ranks != world_size:
        yield Violation(
            "engine.data_parallel",
            engine.data_parallel,
            f"{engine.data_parallel} replicas of {ranks} processes are not the {world_size} processes of the run",
            world_size // ranks,
        )


def _tensor_parallel(engine: MegatronEngineConfig, model: ModelConfig, seq_len: int | None) -> Iterator[Violation]:
    tp, key = engine.tensor_parallel, "engine.tensor_parallel"
    if tp < 1:
        yield Violation(key, tp, "must be at least 1", 1)
        return
    shared = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "model.intermediate_size": model.intermediate_size,
        "model.vocab_size": model.vocab_size,
    }
    nearest = nearest_divisor(math.gcd(*shared.values()), tp)
    for name, size in shared.items():
        if size % tp:
            yield Violation(key, tp, f"does not divide {name} = {size}", nearest)
    if engine.sequence_parallel and tp == 1:
        yield Violation("engine.sequence_parallel", True, "splits the sequence over tensor_parallel ranks: one", False)
    if engine.sequence_parallel and seq_len is not None and seq_len % tp:
        yield Violation(
            "engine.sequence_parallel", True, f"tensor_parallel = {tp} does not divide {seq_len} tokens", False
        )


def _pipeline_parallel(engine: MegatronEngineConfig, model: ModelConfig) -> Iterator[Violation]:
    pp = engine.pipeline_parallel
    if pp < 1 or model.num_layers % pp:
        yield Violation(
            "engine.pipeline_parallel",
            pp,
            f"stages hold equal numbers of blocks, and it does not divide model.num_layers = {model.num_layers}",
            nearest_divisor(model.num_layers, pp),
        )
