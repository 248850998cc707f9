"""Compresses a model directory, one tensor at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hcx.artifacts import artifact_input, digest_file, new_artifact
from hcx.compress.calibration import BlockResult, Calibrator, InputStatistics
from hcx.compress.plan import CompressPlan, ModulePlan
from hcx.compress.scaling import ScaleSearch
from hcx.compress.uniform import quantize_uniform
from hcx.data.batch import MicroBatch
from hcx.errors import CheckpointError, ConfigError
from hcx.kernels import PackedWeight
from hcx.model.convert.hf import copy_tokenizer, write_json, write_weights
from hcx.model.load import QUANT_METHOD, ModelFiles, canonical_names

STEM = "bcq"
"""Weight files are named `bcq*.safetensors`, which a stock loader cannot find: it would fill the weights at random."""
FORMAT_VERSION = 1


@dataclass
class ModuleResult:
    """What became of one weight.

    Attributes:
        stem: module name.
        plan: the settings used.
        relative_error: `|W - W'|_F / |W|_F`.
        bits_per_weight: stored bits, scales and offsets counted.
        weights: number of weights.
        output_error: `|(W - W') X|_F^2 / |W X|_F^2` on the calibration text, if there was any.
    """

    stem: str
    plan: ModulePlan
    relative_error: float
    bits_per_weight: float
    weights: int
    output_error: float | None = None


@dataclass
class CompressionSummary:
    """What became of a model.

    Attributes:
        directory: the compressed model.
        modules: one entry per compressed weight.
        kept_weights, kept_bytes: weights stored as they were, and the room they take.
        file_bytes, source_bytes: of the weight files after and before.
    """

    directory: Path
    modules: list[ModuleResult] = field(default_factory=list)
    kept_weights: int = 0
    kept_bytes: int = 0
    file_bytes: int = 0
    source_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per compressed weight, scales and offsets counted."""
        total = sum(module.weights for module in self.modules)
        return sum(module.bits_per_weight * module.weights for module in self.modules) / total if total else 0.0

    def by_type(self) -> dict[str, dict[str, float]]:
        """Mean relative error and bits per weight by the last part of the module name."""
        groups: dict[str, list[ModuleResult]] = defaultdict(list)
        for module in self.modules:
            groups[module.stem.rsplit(".", 1)[-1]].append(module)
        return {
            name: {
                "modules": len(found),
                "weights": sum(module.weights for module in found),
                "relative_error": sum(module.relative_error for module in found) / len(found),
                "bits_per_weight": sum(m.bits_per_weight * m.weights for m in found) / sum(m.weights for m in found),
            }
            for name, found in groups.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "directory": str(self.directory),
            "bits_per_weight": self.bits_per_weight,
            "kept_weights": self.kept_weights,
            "kept_bytes": self.kept_bytes,
            "file_bytes": self.file_bytes,
            "source_bytes": self.source_bytes,
            "by_type": self.by_type(),
            "modules": {
                module.stem: {
                    **module.plan.model_dump(),
                    "relative_error": module.relative_error,
                    "bits_per_weight": module.bits_per_weight,
                    "weights": module.weights,
                    **({} if module.output_error is None else {"output_error": module.output_error}),
                }
                for module in self.modules
            },
        }


def compress_model(
    source: str | Path,
    out: str | Path,
    plan: CompressPlan,
    progress: Callable[[str], None] | None = None,
    calibration: Sequence[MicroBatch] | None = None,
    found: Mapping[str, PackedWeight] | None = None,
) -> CompressionSummary:
    """Writes a compressed copy of a model directory.

    Args:
        source: a full-precision MODEL directory.
        out: must not exist; complete or absent afterwards.
        plan: what becomes of each weight.
        progress: called with each finished tensor's name.
        calibration: the text that activation-aware methods read; see `calibration_batches`.
        found: stem -> weight that was packed beforehand, of every module that the plan quantizes (`search_model`).

    Raises:
        HcxError: the plan needs calibration text and there is none, the source is no full-precision model, a rule
            matches nothing, or `out` exists.
    """
    source, out = Path(source), Path(out)
    if plan.search is not None and found is None:
        raise ConfigError("this plan searches: run search_model first, and give what it found")
    if plan.needs_calibration and calibration is None and found is None:
        raise ConfigError("this plan reads calibration text: name shards, or files in calibration.texts")
    summary = CompressionSummary(out)
    with ModelFiles(source) as files:
        if files.modules:
            raise CheckpointError(f"{source}: already binary-coded; compress the full-precision model it was made from")
        names = canonical_names(files)
        chosen = choose_modules(files, names, plan)
        entries: dict[str, Any] = {}
        with new_artifact(out, "model", plan, [artifact_input("model", source)]) as artifact:
            walked = plan.needs_calibration and found is None
            blocks = _Blocks(files, chosen, plan, calibration) if walked and calibration else None
            tensors = _compressed(files, names, chosen, summary, entries, progress, blocks, found)
            write_weights(artifact.path, tensors, stem=STEM)
            index = artifact.path / f"{STEM}.safetensors.index.json"
            quantization = {
                "quant_method": QUANT_METHOD,
                "version": FORMAT_VERSION,
                "bits": plan.default.bits,
                "group_size": plan.default.group_size,
                "weight_file": index.name if index.is_file() else f"{STEM}.safetensors",
                "modules": entries,
            }
            write_json(artifact.path / "config.json", {**files.values, "quantization_config": quantization})
            copy_tokenizer(source, artifact.path)
            generation = source / "generation_config.json"
            if generation.is_file():
                (artifact.path / generation.name).write_bytes(generation.read_bytes())
            summary.file_bytes = _weight_bytes(artifact.path)
            summary.source_bytes = _weight_bytes(source)
            (artifact.path / "compression.json").write_text(json.dumps(summary.as_dict(), indent=1), encoding="utf-8")
            artifact.counts = {
                "bits_per_weight": round(summary.bits_per_weight, 4),
                "compressed_weights": sum(module.weights for module in summary.modules),
                "kept_weights": summary.kept_weights,
                "file_bytes": summary.file_bytes,
            }
            if (source / "tokenizer.json").is_file():
                artifact.counts["tokenizer_digest"] = digest_file(source / "tokenizer.json")
    return summary


def choose_modules(files: ModelFiles, names: list[str], plan: CompressPlan) -> dict[str, ModulePlan]:
    """The settings of every weight that is compressed, by stem.

    Raises:
        ConfigError: a rule changes nothing, or the plan keeps every weight.
    """
    stems = [name.removesuffix(".weight") for name in names]
    linears = [stem for stem in stems if stem.startswith("model.layers.") and stem.endswith("_proj")]
    plan.check_rules(linears)
    if plan.output is not None and files.config.tie_embeddings:
        raise ConfigError("output: this model's output is its embedding (tied); set embedding instead")
    matrices = [*linears, *(stem for stem in ("model.embed_tokens", "lm_head") if stem in stems)]
    chosen = {stem: module for stem in matrices if (module := plan.module(stem)) is not None}
    if not chosen:
        raise ConfigError("the plan keeps every weight; nothing would be compressed")
    return chosen


class _Blocks:
    """Blocks quantized with calibration text, as their tensors are asked for in the order of the layers."""

    def __init__(
        self, files: ModelFiles, chosen: dict[str, ModulePlan], plan: CompressPlan, calibration: Sequence[MicroBatch]
    ) -> None:
        self._chosen = chosen
        search = ScaleSearch(self._trial) if plan.calibration.scaling else None
        self._calibrator = Calibrator(files.config, files.read, calibration, self._quantize, search)
        self._current = BlockResult()

    def of(self, name: str) -> BlockResult | None:
        """The block that a tensor belongs to, or None for embedding, output and the last norm."""
        if not name.startswith("model.layers."):
            return None
        layer = int(name.split(".")[2])
        while self._calibrator.layer <= layer:
            self._current = self._calibrator.next_block()
        return self._current

    def _quantize(self, stem: str, weight: Tensor, statistics: InputStatistics) -> PackedWeight | None:
        module = self._chosen.get(stem)
        try:
            return None if module is None else module.quantize(weight, statistics)
        except ConfigError as error:
            raise ConfigError(f"{stem}.weight: {error}") from None

    def _trial(self, stem: str, weight: Tensor) -> Tensor | None:
        # Rounding stands in for the slower methods: what counts is how hard a scaled weight is on so many levels.
        module = self._chosen.get(stem)
        return None if module is None else quantize_uniform(weight, module.bits, module.group_size).dequantize()


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _compressed(
    files: ModelFiles,
    names: list[str],
    chosen: dict[str, ModulePlan],
    summary: CompressionSummary,
    entries: dict[str, Any],
    progress: Callable[[str], None] | None,
    blocks: _Blocks | None = None,
    found: Mapping[str, PackedWeight] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        stem = name.removesuffix(".weight")
        block = blocks.of(name) if blocks is not None else None
        weight = block.dense.get(name) if block is not None else None
        weight = files.read(name) if weight is None else weight.to(files.read(name).dtype)
        module = chosen.get(stem)
        if module is None:
            summary.kept_weights += weight.numel()
            summary.kept_bytes += weight.numel() * weight.element_size()
            yield name, weight
        else:
            try:
                if found is not None:
                    packed = found[stem]
                else:
                    packed = block.packed[stem] if block is not None else module.quantize(weight.float())
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
            if block is not None:
                relative = block.weight_errors[stem]
            else:
                norm = float(weight.float().norm())
                relative = float((packed.dequantize() - weight.float()).norm()) / norm if norm else 0.0
            summary.modules.append(
                ModuleResult(
                    stem,
                    module,
                    relative,
                    packed.bits_per_weight,
                    weight.numel(),
                    block.errors.get(stem) if block else None,
                )
            )
            entries[stem] = {**packed.describe(), "method": module.method if found is None else "loss-searched"}
            yield from packed.to_tensors(stem).items()
        if progress is not None:
            progress(name)
