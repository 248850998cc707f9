"""A plan with a bit width for each group of layers: sensitivities on held-out text, then the exact allocation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcx.artifacts.durable import write_atomically
from hcx.compress import CompressPlan, InputStatistics, ModulePlan, PlanRule, collect
from hcx.compress.allocate import Allocation, Choice, allocate
from hcx.compress.bcq import SCALE_DTYPES
from hcx.compress.sensitivity import groups_of, measure_sensitivity
from hcx.compress.text_reader import Losses, Objective, TextReader, by_domain
from hcx.data import MicroBatch, ShardSet, validation_batches
from hcx.errors import ConfigError, DataError
from hcx.model.decoder import Decoder
from hcx.model.load import ModelFiles, load_model
from hcx.recipe.finished import differences

MICRO_BATCH, ALL = 4, 1 << 30
"""Rows."""


@dataclass(frozen=True)
class Reading:
    """What sensitivities are read on, and how.

    Attributes:
        objective: `loss` of the next token, or `divergence` from full precision, which tells small changes apart on far
            less text.
        max_documents: held-out documents of each language.
        max_rows: of each language, spread evenly over those of its documents; all if None.
        seq_len: tokens per row.
        first_documents: language -> number of the first one; 0 if not named.
    """

    objective: Objective = "loss"
    max_documents: int = 16
    max_rows: int | None = None
    seq_len: int = 256
    first_documents: Mapping[str, int] = field(default_factory=dict)

    def text(self, shards: ShardSet, languages: Sequence[str]) -> list[MicroBatch]:
        """The rows of each language, a few at a time.

        Raises:
            ConfigError: a number is below 1.
            DataError: a language has no such documents.
        """
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigError(f"max_rows = {self.max_rows}; must be at least 1")
        found: list[MicroBatch] = []
        for language in languages:
            first = self.first_documents.get(language, 0)
            [whole] = validation_batches(shards, language, self.seq_len, ALL, self.max_documents, first)
            rows = len(whole.sources)
            count = rows if self.max_rows is None else min(self.max_rows, rows)
            chosen = [place * rows // count for place in range(count)]
            found += [whole.select(chosen[start : start + MICRO_BATCH]) for start in range(0, count, MICRO_BATCH)]
        return found


DEFAULT_READING = Reading()


@dataclass(frozen=True)
class AllocationReport:
    """A plan and the measurements behind it.

    Attributes:
        plan: what to compress with.
        allocation: the choice of each group.
        loss: of full precision, by language: nats per token, or 0 where divergence from it was read.
        rises: group -> bits -> language -> rise of the loss with that group alone quantized.
        average_bits: planes per weight of the plan.
    """

    plan: CompressPlan
    allocation: Allocation
    loss: dict[str, float]
    rises: dict[str, dict[int, dict[str, float]]]
    average_bits: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "average_bits": self.average_bits,
            "bits": self.allocation.bits,
            "predicted_rise": self.allocation.loss,
            "loss": self.loss,
            "rises": self.rises,
        }


def stored_bits(rows: int, columns: int, bits: int, module: ModulePlan) -> int:
    """Of a matrix with so many planes, by the settings of a plan; scales, offset and padding counted."""
    groups = -(-columns // min(module.group_size, columns))
    scale_bits = torch.finfo(SCALE_DTYPES[module.scale_dtype]).bits
    offset = 32 * rows * groups if module.offset or module.method == "uniform" else 0
    return bits * rows * (8 * -(-columns // 8) + groups * scale_bits) + offset


@dataclass(frozen=True)
class Sensitivities:
    """What the loss rises by when one group of layers alone is quantized, at each width.

    Attributes:
        shapes: module -> (rows, columns).
        groups: name -> modules.
        loss: of full precision, by language.
        rises: group -> bits -> language -> rise.
    """

    shapes: dict[str, tuple[int, int]]
    groups: dict[str, list[str]]
    loss: dict[str, float]
    rises: dict[str, dict[int, dict[str, float]]]

    def keep(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Writes them to a JSON file, with what they were read with."""
        write_atomically(path, (json.dumps({"settings": settings, **asdict(self)}, indent=1) + "\n").encode())

    @classmethod
    def kept(cls, path: Path, settings: Mapping[str, Any]) -> Sensitivities:
        """Those of a file.

        Raises:
            DataError: the file has none.
            ConfigError: they were read with other settings.
        """
        try:
            found = json.loads(path.read_bytes())
            told = dict(found["settings"])
            read = cls(
                {stem: (int(rows), int(columns)) for stem, (rows, columns) in found["shapes"].items()},
                found["groups"],
                found["loss"],
                {name: {int(bits): rise for bits, rise in rises.items()} for name, rises in found["rises"].items()},
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: no file of sensitivities ({error}); name another, or remove it") from None
        if differing := differences(told, json.loads(json.dumps(settings))):
            raise ConfigError(f"{path}: sensitivities read with other settings ({differing}); name another file")
        return read


def read_sensitivities(
    model: str | Path,
    shards_directory: str | Path,
    default: ModulePlan,
    widths: Sequence[int],
    by: str = "layer",
    languages: Sequence[str] | None = None,
    reading: Reading = DEFAULT_READING,
    progress: Callable[[str], None] | None = None,
    statistics: Mapping[str, InputStatistics] | None = None,
) -> Sensitivities:
    """Reads the loss of held-out documents with each group of layers quantized alone.

    Args:
        model: full-precision MODEL directory.
        shards_directory: whose held-out documents are read.
        default: settings of the quantizer but for the bits.
        widths: planes to try.
        by: `matrix`, `layer` (attention and MLP of each block) or `type`.
        languages: to read; all that have held-out documents if None.
        reading: how much of them, and what is read.
        progress: called after each reading.
        statistics: module -> of its inputs at full precision, where the quantizer needs them.

    Raises:
        ConfigError: it needs them, and there are none.
    """
    shards = ShardSet.open(shards_directory)
    chosen = tuple(languages if languages is not None else _shares(shards, None))
    decoder = load_model(model).decoder
    shapes = {
        block.name.removesuffix(".weight"): (block.global_shape[0], block.global_shape[-1])
        for blocks in decoder.parameter_map().values()
        for block in blocks
    }
    stems = [stem for stem in shapes if stem.startswith("model.layers.") and stem.endswith("_proj")]
    groups = groups_of(stems, by)

    def quantized(stem: str, weight: Tensor, bits: int) -> Tensor:
        plan = default.model_copy(update={"bits": bits})
        return plan.quantize(weight, None if statistics is None else statistics[stem]).dequantize()

    reader = TextReader(decoder, reading.text(shards, chosen), reading.objective)

    def begin(stems: Sequence[str]) -> None:
        reader.keep(min(int(stem.split(".")[2]) for stem in stems))

    def loss(model: Decoder) -> Losses:
        return by_domain(reader.rows())

    whole, rises = measure_sensitivity(decoder, groups, widths, quantized, loss, progress, begin)
    return Sensitivities({stem: shapes[stem] for stem in stems}, groups, whole, rises)


def allocation_of(
    read: Sensitivities, average_bits: float, base: CompressPlan, shares: Mapping[str, float] | None = None
) -> AllocationReport:
    """The plan of least predicted loss that takes no more than `average_bits` planes everywhere would take.

    Args:
        read: sensitivities at every width to choose from.
        average_bits: planes per weight.
        base: everything but the bits; it must not have rules of its own.
        shares: language -> weight of its loss; equal if None.

    Raises:
        ConfigError: `average_bits` is outside the widths.
    """
    weights = dict.fromkeys(read.loss, 1.0) if shares is None else dict(shares)
    widths = list(next(iter(read.rises.values())))
    _check_average(average_bits, widths)
    total = sum(weights.values())

    def cost(name: str, bits: int) -> int:
        return sum(stored_bits(*read.shapes[stem], bits, base.default) for stem in read.groups[name])

    items = {
        name: [
            Choice(bits, cost(name, bits), sum(weights[key] * rise for key, rise in rises[bits].items()) / total)
            for bits in widths
        ]
        for name, rises in read.rises.items()
    }
    # What `average_bits` planes everywhere would take: a plane costs the same whichever it is.
    planes = {name: cost(name, 2) - cost(name, 1) for name in read.groups}
    budget = sum(cost(name, 1) for name in read.groups) + math.floor((average_bits - 1) * sum(planes.values()) + 1e-6)
    found = allocate(items, budget)
    rules = tuple(PlanRule(pattern=name, bits=choice.bits) for name, choice in found.choices.items())
    mean = sum(choice.bits * planes[name] for name, choice in found.choices.items()) / sum(planes.values())
    return AllocationReport(base.model_copy(update={"rules": rules}), found, read.loss, read.rises, mean)


def allocate_bits(
    model: str | Path,
    shards_directory: str | Path,
    average_bits: float,
    base: CompressPlan | None = None,
    widths: Sequence[int] = (1, 2, 3, 4, 5, 6),
    by: str = "layer",
    shares: Mapping[str, float] | None = None,
    reading: Reading = DEFAULT_READING,
    progress: Callable[[str], None] | None = None,
    calibration: Sequence[MicroBatch] | None = None,
) -> AllocationReport:
    """Sensitivities on held-out text, and the plan that they ask for: `read_sensitivities`, then `allocation_of`.

    Args:
        model: full-precision MODEL directory.
        shards_directory: whose held-out documents the loss is read on.
        average_bits: planes per weight, any number between the smallest and the largest width; scales come on top as in
            a uniform plan.
        base: everything but the bits; `CompressPlan()` if None. It must not have rules of its own.
        widths: planes to choose from.
        by: `matrix`, `layer` (attention and MLP of each block) or `type`.
        shares: language -> weight of its loss; equal if None.
        reading: what is read of the held-out documents.
        progress: called after each reading.
        calibration: text that the quantizer of `base` keeps layers' outputs on, if it needs any. Its statistics are of
            full precision, and held for the whole model.

    Raises:
        HcxError: an argument is out of range, or model and shards do not fit.
    """
    base = base or CompressPlan()
    if base.rules or base.default.prune is not None:
        raise ConfigError("an allocation makes the rules of a plan; give it one without rules and pruning")
    if not widths or min(widths) < 1 or max(widths) > 8 or len(set(widths)) != len(widths):
        raise ConfigError(f"widths = {list(widths)}; different numbers from 1 to 8 are allowed")
    _check_average(average_bits, widths)
    weights = _shares(ShardSet.open(shards_directory), shares)
    groups_of((), by)  # an unknown level is refused before the calibration
    statistics = None
    if base.default.needs_statistics and calibration is not None:
        with ModelFiles(model) as files:
            statistics = dict(collect(files.config, files.read, calibration))
    read = read_sensitivities(
        model, shards_directory, base.default, widths, by, tuple(weights), reading, progress, statistics
    )
    return allocation_of(read, average_bits, base, weights)


def _check_average(average_bits: float, widths: Sequence[int]) -> None:
    if not min(widths) <= average_bits <= max(widths):
        raise ConfigError(f"average_bits = {average_bits}; with widths {list(widths)}: {min(widths)} to {max(widths)}")


def _shares(shards: ShardSet, shares: Mapping[str, float] | None) -> dict[str, float]:
    known = [name for name in shards.languages if shards.shard(name, "validation").num_documents]
    weights = dict.fromkeys(known, 1.0) if shares is None else dict(shares)
    if unknown := sorted(set(weights) - set(known)):
        raise ConfigError(f"shares: no held-out text of {', '.join(unknown)}; there is {', '.join(known)}")
    if not weights or min(weights.values()) < 0 or not sum(weights.values()) > 0:
        raise ConfigError(f"shares = {weights}; must not be negative, and one must be positive")
    return weights
