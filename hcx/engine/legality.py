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

AnyEngineConfig = TorchEngineConfig | DeepSpeedEngineConfig | MegatronEngineConfig


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
    return min(_divisors(number), key=lambda divisor: (abs(divisor - wanted), divisor))


def violations(
    engine: AnyEngineConfig,
    model: ModelConfig,
    world_size: int,
    seq_len: int | None = None,
    optimizer: str | None = None,
    micro_batches: int | None = None,
) -> list[Violation]:
    """Every rule that `engine` breaks for this model on `world_size` processes; empty: legal.

    `seq_len` is the number of tokens in a row of a micro-batch, `optimizer` is `optim.kind`, `micro_batches` their
    number in a step over all replicas, where they are known.
    """
    found = list(_replicas(engine, world_size))
    if isinstance(engine, MegatronEngineConfig):
        found += _tensor_parallel(engine, model, seq_len)
        found += _pipeline_parallel(engine, model)
        found += _virtual_pipeline(engine, model, world_size, micro_batches)
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
    if isinstance(engine, DeepSpeedEngineConfig) and engine.offload_optimizer == "cpu" and engine.zero_stage == 0:
        found.append(
            Violation("engine.offload_optimizer", "cpu", "stage 0 has no shards of its own to keep elsewhere", "none")
        )
    found += _optimizer(engine, optimizer)
    return found


def require_legal(
    engine: AnyEngineConfig,
    model: ModelConfig,
    world_size: int,
    seq_len: int | None = None,
    optimizer: str | None = None,
    micro_batches: int | None = None,
) -> None:
    """Raises ConfigError with every violation, its reason and nearest legal value, and the nearest legal layout."""
    lines = explain(engine, model, world_size, seq_len, optimizer, micro_batches)
    if lines:
        raise ConfigError("\n".join(lines))


def explain(
    engine: AnyEngineConfig,
    model: ModelConfig,
    world_size: int,
    seq_len: int | None = None,
    optimizer: str | None = None,
    micro_batches: int | None = None,
) -> list[str]:
    """A line for every violation, and one for the nearest legal layout where that is another engine setting."""
    known = (model, world_size, seq_len, optimizer, micro_batches)
    lines = [str(violation) for violation in violations(engine, *known)]
    near = nearest_legal(engine, *known) if lines else None
    if near is not None and near != engine:
        lines.append(f"nearest legal layout on {world_size} processes: {' '.join(changes(engine, near))}")
    return lines


def changes(engine: AnyEngineConfig, other: AnyEngineConfig) -> list[str]:
    """The overrides that turn one engine's settings into another's, such as `engine.tensor_parallel=2`."""
    new, same_kind = other.model_dump(), engine.kind == other.kind
    old = engine.model_dump() if same_kind else {}
    defaults = type(other)().model_dump()
    found = [] if same_kind else [f"engine.kind={other.kind}"]
    for key, value in new.items():
        if key != "kind" and value != old.get(key, defaults[key]):
            found.append(f"engine.{key}={'null' if value is None else _yaml(value)}")
    return found


def nearest_legal(
    engine: AnyEngineConfig,
    model: ModelConfig,
    world_size: int,
    seq_len: int | None = None,
    optimizer: str | None = None,
    micro_batches: int | None = None,
) -> AnyEngineConfig | None:
    """The legal layout of the same kind with the fewest and smallest changes; None where no setting of it helps.

    Distance is counted in factors of parallel sizes: from 8 to 4 is as far as from 2 to 1.
    """
    candidates: list[tuple[float, AnyEngineConfig]] = []
    for layout, distance in _sizes(engine, model, world_size):
        for _ in range(3):  # a mended flag may uncover another
            found = violations(layout, model, world_size, seq_len, optimizer, micro_batches)
            repairs = {
                violation.key.removeprefix("engine."): violation.nearest
                for violation in found
                if violation.key.startswith("engine.") and violation.nearest is not None
            }
            if not repairs:
                break
            layout = layout.model_copy(update=repairs)
            distance += 0.5 * len(repairs)
        if not violations(layout, model, world_size, seq_len, optimizer, micro_batches):
            candidates.append((distance, layout))
    return min(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def _sizes(engine: AnyEngineConfig, model: ModelConfig, world_size: int) -> Iterator[tuple[AnyEngineConfig, float]]:
    """Every grid of ranks that the model and the processes allow, with its distance from the one asked for."""
    if not isinstance(engine, MegatronEngineConfig):
        yield engine, 0.0
        return
    for tp in _divisors(math.gcd(*_shared(model).values(), world_size)):
        for pp in _divisors(math.gcd(model.num_layers, world_size // tp)):
            if world_size % (tp * pp):
                continue
            distance = abs(math.log2(tp / max(1, engine.tensor_parallel)))
            distance += abs(math.log2(pp / max(1, engine.pipeline_parallel)))
            yield engine.model_copy(update={"tensor_parallel": tp, "pipeline_parallel": pp}), distance


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _optimizer(engine: AnyEngineConfig, optimizer: str | None) -> Iterator[Violation]:
    if optimizer == "muon" and not isinstance(engine, TorchEngineConfig):
        yield Violation(
            "optim.kind",
            "muon",
            f"updates whole matrices, which engine.kind = {engine.kind} shards; or use engine.kind = torch",
            "adamw",
        )
    if optimizer == "sgd" and isinstance(engine, MegatronEngineConfig) and engine.distributed_optimizer:
        yield Violation(
            "engine.distributed_optimizer",
            True,
            "megatron-core shards the state of adamw only; use optim.kind = adamw, or none of it",
            False,
        )


def _replicas(engine: AnyEngineConfig, world_size: int) -> Iterator[Violation]:
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
    shared = _shared(model)
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


def _shared(model: ModelConfig) -> dict[str, int]:
    """What tensor-parallel ranks divide among them."""
    return {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "model.intermediate_size": model.intermediate_size,
        "model.vocab_size": model.vocab_size,
    }


def _pipeline_parallel(engine: MegatronEngineConfig, model: ModelConfig) -> Iterator[Violation]:
    pp = engine.pipeline_parallel
    if pp < 1 or model.num_layers % pp:
        yield Violation(
            "engine.pipeline_parallel",
            pp,
            f"stages hold equal numbers of blocks, and it does not divide model.num_layers = {model.num_layers}",
            nearest_divisor(model.num_layers, pp),
        )


def _virtual_pipeline(
    engine: MegatronEngineConfig, model: ModelConfig, world_size: int, micro_batches: int | None
) -> Iterator[Violation]:
    """What megatron-core's interleaved schedule asks for."""
    tp, pp, chunks = engine.tensor_parallel, engine.pipeline_parallel, engine.virtual_pipeline_parallel
    key = "engine.virtual_pipeline_parallel"
    if chunks < 1:
        yield Violation(key, chunks, "must be at least 1", 1)
    if chunks <= 1 or pp < 1:
        return
    if pp == 1:
        yield Violation(key, chunks, "interleaves the blocks of several stages, and pipeline_parallel is 1", 1)
        return
    if model.num_layers % pp == 0 and model.num_layers % (pp * chunks):
        yield Violation(
            key,
            chunks,
            f"chunks hold equal numbers of blocks, and it does not divide the {model.num_layers // pp} of a stage",
            nearest_divisor(model.num_layers // pp, chunks),
        )
    replicas = world_size // (tp * pp) if tp > 0 else 0
    if micro_batches is not None and replicas and micro_batches % replicas == 0 and micro_batches // replicas % pp:
        yield Violation(
            key,
            chunks,
            f"the schedule takes micro-batches in groups of pipeline_parallel = {pp}, and a step has "
            f"{micro_batches // replicas} on each replica; or choose a batch that makes a multiple of {pp}",
            1,
        )
