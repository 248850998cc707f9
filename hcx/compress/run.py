"""Compresses a model, one tensor at a time and one layer per file: it needs little memory and can be resumed."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hcx.artifacts import artifact_input, digest_file, new_artifact
from hcx.artifacts.manifest import producer
from hcx.artifacts.tensors import join_safetensors
from hcx.compress.bcq import coder
from hcx.compress.calibrated import CalibratedBlocks, calibration_digest
from hcx.compress.plan import CompressPlan, ModulePlan
from hcx.compress.preview import PreviewRow, preview
from hcx.compress.work import DiskFull, WorkDirectory, in_layers, told_if_full
from hcx.data.batch import MicroBatch
from hcx.errors import CheckpointError, ConfigError, HcxError
from hcx.kernels import PackedWeight
from hcx.kernels.masked import EncodedWeight, MaskedWeight
from hcx.kernels.segmented import SegmentedWeight
from hcx.model.convert.hf import MAX_SHARD_BYTES, write_json
from hcx.model.load import QUANT_METHOD, ModelFiles, canonical_names

STEM = "bcq"
"""Weight files are named `bcq*.safetensors`, which a stock loader cannot find: it would fill the weights at random."""
FORMAT_VERSION = 1
OWN_GRID = 1e-3
"""Relative error below which the weights lay on the chosen grid before, but for the rounding of scales to fp16: eight
bits with a scale for every 32 inputs leave several times as much of any other weights."""


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

    @property
    def own_grid(self) -> bool:
        """Whether the weights were values of this very grid before, so that nothing was lost and nothing is shown.

        A checkpoint that was quantized once (many GGUF files) comes through a second time unchanged, if bits and group
        size are the same; a table would call that lossless.
        """
        return bool(self.modules) and all(module.relative_error < OWN_GRID for module in self.modules)

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
            "own_grid": self.own_grid,
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
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> CompressionSummary:
    """Writes a compressed copy of a model, layer by layer; what was killed goes on where it was when called again.

    Args:
        source: a full-precision MODEL, a directory or a GGUF file.
        out: must not exist; complete or absent afterwards. Unfinished work lies beside it, in `.NAME.work`.
        plan: what becomes of each weight.
        progress: called with each finished tensor's name.
        calibration: the text that activation-aware methods read; see `calibration_batches`.
        found: stem -> weight that was packed beforehand, of every module that the plan quantizes (`search_model`).
        max_shard_bytes: a new weight file begins beyond this size.

    Raises:
        HcxError: the plan needs calibration text and there is none, the source is no full-precision model, a rule
            matches nothing, `out` exists, unfinished work of another plan lies there, or the disk is full.
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
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            # The artifact says so too, but only when hours have passed.
            raise CheckpointError(f"{out}: already exists; choose another directory or remove it")
        origin = artifact_input("model", source)
        identity = {"source": origin.digest, "plan": plan.model_dump(mode="json"), "format": FORMAT_VERSION}
        identity["hcx"] = producer()["version"]
        identity["coder"] = coder()
        blocks: CalibratedBlocks | None = None
        if plan.needs_calibration and calibration is not None:
            identity["calibration"] = calibration_digest(calibration)
        if plan.needs_calibration and calibration is not None and found is None:
            blocks = CalibratedBlocks(files, chosen, plan, calibration)

        def compressed(layer: list[str]) -> Iterator[tuple[str, Tensor]]:
            return _compressed(files, layer, chosen, summary, entries, progress, blocks, found)

        with (
            _resumable(out, identity) as work,
            told_if_full(work.path),
            new_artifact(out, "model", plan, [origin]) as artifact,
        ):
            parts = _layers(work, names, summary, entries, compressed, progress, blocks)
            join_safetensors(artifact.path, parts, STEM, max_shard_bytes)
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
            files.write_tokenizer(artifact.path)
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
            if (artifact.path / "tokenizer.json").is_file():
                artifact.counts["tokenizer_digest"] = digest_file(artifact.path / "tokenizer.json")
    return summary


@contextmanager
def _resumable(out: Path, identity: dict[str, Any]) -> Iterator[WorkDirectory]:
    """The work directory of a compression: it stays where going on makes sense, and goes where it does not."""
    path = out.with_name(f".{out.name}.work")
    with told_if_full(path):
        work = WorkDirectory(path, identity)
    # Of a command that was killed while it put the layers together; the lock says that it is gone.
    for left in out.parent.glob(f".{out.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield work
    except DiskFull:
        work.close()
        raise
    except HcxError:
        # The source or the plan is at fault: neither will be the same when they are mended.
        work.remove()
        raise
    except BaseException:
        work.close()
        raise
    work.remove()


def _layers(
    work: WorkDirectory,
    names: list[str],
    summary: CompressionSummary,
    entries: dict[str, Any],
    compressed: Callable[[list[str]], Iterator[tuple[str, Tensor]]],
    progress: Callable[[str], None] | None,
    blocks: CalibratedBlocks | None = None,
) -> list[Path]:
    """The files of all layers, those that are there already and those that are made now; fills summary and entries."""
    parts = []
    for number, layer in enumerate(in_layers(names)):
        parts.append(work.layer(number))
        record = work.finished(number)
        if record is not None:
            outcome = record["outcome"]
            entries.update(outcome["entries"])
            summary.kept_weights += outcome["kept_weights"]
            summary.kept_bytes += outcome["kept_bytes"]
            for module in outcome["modules"]:
                plan = ModulePlan.model_validate(module["plan"], strict=False)
                summary.modules.append(ModuleResult(**{**module, "plan": plan}))
            if blocks is not None:
                blocks.skip(layer, work.layer(number), outcome["entries"])
            for name in layer:
                if progress is not None:
                    progress(name)
            continue
        modules, known = len(summary.modules), set(entries)
        kept_weights, kept_bytes = summary.kept_weights, summary.kept_bytes
        tensors = {name: tensor.contiguous() for name, tensor in compressed(layer)}
        results = [
            asdict(module) | {"plan": module.plan.model_dump(mode="json")} for module in summary.modules[modules:]
        ]
        outcome = {
            "entries": {stem: entry for stem, entry in entries.items() if stem not in known},
            "kept_weights": summary.kept_weights - kept_weights,
            "kept_bytes": summary.kept_bytes - kept_bytes,
            "modules": results,
        }
        work.finish(number, tensors, {"outcome": outcome})
    return parts


def plan_rows(source: str | Path, plan: CompressPlan) -> tuple[list[PreviewRow], int]:
    """What the plan will do to a model, and how many tensors there are to go through; reads no weight.

    Raises:
        HcxError: as `compress_model`, as far as it shows without the weights.
    """
    with ModelFiles(source) as files:
        if files.modules:
            raise CheckpointError(f"{source}: already binary-coded; compress the full-precision model it was made from")
        names = canonical_names(files)
        chosen = choose_modules(files, names, plan)
        shapes = {name: files.shape(name) for name in names}
        dtype = str(files.values.get("dtype") or files.values.get("torch_dtype") or "float32")
    return preview(plan, shapes, chosen, 2 if "16" in dtype else 4), len(names)


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


def _weight_bytes(directory: Path) -> int:
    if directory.is_file():
        return directory.stat().st_size
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _compressed(
    files: ModelFiles,
    names: list[str],
    chosen: dict[str, ModulePlan],
    summary: CompressionSummary,
    entries: dict[str, Any],
    progress: Callable[[str], None] | None,
    blocks: CalibratedBlocks | None = None,
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
                packed: PackedWeight | MaskedWeight | EncodedWeight | SegmentedWeight
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
