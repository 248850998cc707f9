"""The chain of manifests from a result back to the digests of the raw text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hcx.report.evidence import Artifact, Evidence

MAX_FILES = 12
"""Plain input files listed per artifact; the rest is counted."""


@dataclass(frozen=True)
class LedgerLine:
    """One line of the ledger, indented by `depth`.

    Attributes:
        role: what it was to the line above (`model`, `shards`, `text`); empty for a root.
        kind: kind of the artifact, or `file`.
        name: the path's last parts, for people.
        digest: of the manifest or the file.
        detail: counts in a few words.
        known: whether the artifact itself lies in the report's directories.
        repeated: its inputs are listed further up already.
    """

    depth: int
    role: str
    kind: str
    name: str
    digest: str
    detail: str = ""
    known: bool = True
    repeated: bool = False


def ledger(evidence: Evidence) -> list[LedgerLine]:
    """Follows inputs from every artifact that no other one uses, newest first."""
    known = evidence.by_digest()
    used = {item.digest for artifact in evidence.artifacts for item in artifact.manifest.inputs}
    roots = [artifact for artifact in reversed(evidence.artifacts) if artifact.digest not in used]
    roots = [artifact for artifact in roots if artifact.manifest.kind not in ("report", "checkpoint")]
    lines: list[LedgerLine] = []
    seen: set[str] = set()
    for root in roots:
        _follow(root, "", 0, evidence, known, seen, lines)
    return lines


def _follow(
    artifact: Artifact,
    role: str,
    depth: int,
    evidence: Evidence,
    known: dict[str, Artifact],
    seen: set[str],
    lines: list[LedgerLine],
) -> None:
    manifest = artifact.manifest
    repeated = artifact.digest in seen and bool(manifest.inputs)
    name = _short_path(artifact.path, evidence.directories)
    lines.append(LedgerLine(depth, role, manifest.kind, name, artifact.digest, _detail(artifact), repeated=repeated))
    if repeated:
        return
    seen.add(artifact.digest)
    files = 0
    for item in manifest.inputs:
        if item.digest in known and known[item.digest] is not artifact:
            _follow(known[item.digest], item.role, depth + 1, evidence, known, seen, lines)
            continue
        files += 1
        if files <= MAX_FILES:
            plain = item.kind == "file"
            lines.append(LedgerLine(depth + 1, item.role, item.kind, Path(item.path).name, item.digest, known=plain))
    if files > MAX_FILES:
        lines.append(LedgerLine(depth + 1, "", "", f"and {files - MAX_FILES} more inputs in its manifest", ""))


def _short_path(path: Path, roots: list[Path]) -> str:
    for root in roots:
        if path.is_relative_to(root) and path != root:
            return str(path.relative_to(root))
    return path.name


def _detail(artifact: Artifact) -> str:
    parts = []
    for key, value in artifact.manifest.counts.items():
        if isinstance(value, int) and not isinstance(value, bool):
            parts.append(f"{value:,} {key.replace('_', ' ')}")
        elif isinstance(value, float):
            parts.append(f"{key.replace('_', ' ')} {value:.4g}")
    return ", ".join(parts[:4])
