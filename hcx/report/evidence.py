"""Finds artifacts under directories by the kind their manifests state, and reads what the page shows of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hcx.artifacts import Manifest, digest_file, read_manifest
from hcx.artifacts.manifest import MANIFEST
from hcx.config.decode import load_yaml
from hcx.errors import HcxError
from hcx.obs import read_jsonl
from hcx.report.schema import EvalResults, MethodTable, Quality, Samples, Serving

M = TypeVar("M", bound=BaseModel)

MAX_DEPTH = 6
"""How deep below a given directory artifacts are looked for."""
WEIGHT_SUFFIX = ".safetensors"
EVAL_KINDS = ("eval", "evaluation")


@dataclass(frozen=True)
class Artifact:
    """A directory with a manifest; `digest` is that of the manifest, by which others name it as an input."""

    path: Path
    manifest: Manifest
    digest: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files that the manifest lists."""
        files = self.manifest.files.items()
        return sum(int(entry["size_bytes"]) for name, entry in files if name.endswith(WEIGHT_SUFFIX))


@dataclass(frozen=True)
class Run:
    """A training run: its metrics, one row per step, and its resolved recipe."""

    path: Path
    rows: list[dict[str, Any]]
    recipe: dict[str, Any]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a metric; rows without it, or with a value that is no number, are left out."""
        points = [(row.get("step"), row.get(name)) for row in self.rows]
        kept = [(float(x), float(y)) for x, y in points if isinstance(x, (int, float)) and isinstance(y, (int, float))]
        return [x for x, _ in kept], [y for _, y in kept]

    def last(self, name: str) -> float | None:
        """The last value of a metric."""
        values = self.series(name)[1]
        return values[-1] if values else None


@dataclass(frozen=True)
class EvalRun:
    """The results of one `hcx eval`, with the label of the model they belong to."""

    artifact: Artifact
    model_label: str
    results: EvalResults


@dataclass
class Evidence:
    """Everything that was found, and `notes` on what could not be read."""

    directories: list[Path]
    artifacts: list[Artifact] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    quality: Quality | None = None
    samples: Samples | None = None
    serving: Serving | None = None
    methods: MethodTable | None = None
    evals: list[EvalRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Artifact]:
        """Artifacts of a kind, in the order found."""
        return [artifact for artifact in self.artifacts if artifact.manifest.kind == kind]

    def by_digest(self) -> dict[str, Artifact]:
        """Manifest digest -> artifact."""
        return {artifact.digest: artifact for artifact in self.artifacts}

    def label(self, model: Artifact) -> str:
        """How tables name a model: the label of the quality figures, else what its configuration says."""
        for row in self.quality.models if self.quality else ():
            if row.digest == model.digest:
                return row.label
        return model_label(model)


def model_label(model: Artifact) -> str:
    """`4 bit` or `full`, from the quantization that the model directory's `config.json` states."""
    try:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        quantization = config.get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return model.path.name
    if not isinstance(quantization, dict):
        return "full"
    bits = quantization.get("bits")
    return f"{bits:g} bit" if isinstance(bits, (int, float)) else "mixed bits"


def collect(directories: Sequence[str | Path]) -> Evidence:
    """Reads all artifacts and runs below the directories. What is damaged becomes a note, not an error.

    Raises:
        HcxError: a directory does not exist, or nothing at all was found.
    """
    evidence = Evidence([Path(d) for d in directories])
    for directory in evidence.directories:
        if not directory.is_dir():
            raise HcxError(f"{directory}: no such directory; give directories that hcx wrote, such as ./demo")
    for path in _walk(evidence.directories):
        if (path / MANIFEST).is_file():
            try:
                evidence.artifacts.append(Artifact(path, read_manifest(path), digest_file(path / MANIFEST)))
            except HcxError as error:
                evidence.notes.append(str(error))
        if (path / "metrics.jsonl").is_file():
            _read_run(path, evidence)
    if not evidence.artifacts and not evidence.runs:
        shown = ", ".join(map(str, evidence.directories))
        raise HcxError(f"{shown}: no artifact (manifest.json) or run (metrics.jsonl) found below; nothing to report")
    # The newest measurement wins: reports are made of what is true now.
    evidence.artifacts.sort(key=lambda artifact: (artifact.manifest.created, str(artifact.path)))
    for artifact in evidence.artifacts:
        kind = artifact.manifest.kind
        if kind == "quality":
            evidence.quality = _read(artifact, "quality.json", Quality, evidence.notes) or evidence.quality
        elif kind == "samples":
            evidence.samples = _read(artifact, "samples.json", Samples, evidence.notes) or evidence.samples
        elif kind == "serving":
            evidence.serving = _read(artifact, "serving.json", Serving, evidence.notes) or evidence.serving
        elif kind == "methods":
            evidence.methods = _read(artifact, "comparison.json", MethodTable, evidence.notes) or evidence.methods
    for artifact in (artifact for artifact in evidence.artifacts if artifact.manifest.kind in EVAL_KINDS):
        results = _read(artifact, "results.json", EvalResults, evidence.notes)
        if results is not None:
            evidence.evals.append(EvalRun(artifact, _evaluated_model(artifact, evidence), results))
    return evidence


def _walk(roots: Iterable[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for root in roots:
        depth = len(root.resolve().parts)
        for current, folders, _ in os.walk(root):
            path = Path(current)
            # Hidden siblings are artifacts being written; they are nobody's evidence yet.
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if len(path.resolve().parts) - depth >= MAX_DEPTH:
                folders.clear()
            found.setdefault(path, None)
    return list(found)


def _read(artifact: Artifact, name: str, model: type[M], notes: list[str]) -> M | None:
    path = artifact.path / name
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        notes.append(f"{path}: {error}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        notes.append(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
    return None


def _read_run(path: Path, evidence: Evidence) -> None:
    try:
        rows = list(read_jsonl(path / "metrics.jsonl"))
        recipe = load_yaml(path / "recipe.yaml") if (path / "recipe.yaml").is_file() else {}
    except (HcxError, OSError, UnicodeDecodeError) as error:
        evidence.notes.append(str(error))
        return
    evidence.runs.append(Run(path, [row for row in rows if isinstance(row, dict)], recipe))


def _evaluated_model(artifact: Artifact, evidence: Evidence) -> str:
    known = evidence.by_digest()
    for item in artifact.manifest.inputs:
        if item.role == "model":
            model = known.get(item.digest)
            return evidence.label(model) if model else Path(item.path).name
    return artifact.path.name
