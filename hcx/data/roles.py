"""What a collection of data sets says that its files are for, and keeping evaluation sets out of training.

A collection is a folder with a `MANIFEST.tsv` that has the columns `file` (path below the folder) and `role`: `train`;
`dev` (choose prompts, thresholds and checkpoints: held out); `eval` (never train); `by split field` (each row says).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from hcx.errors import DataError

MANIFEST = "MANIFEST.tsv"
BY_ROW: Literal["by split field"] = "by split field"
DEV: Literal["dev"] = "dev"
_LEVELS = 4
"""Folders above a file in which its collection is looked for."""

Role = Literal["train", "dev", "eval", "by split field"] | None


def training_role(path: Path) -> Role:
    """The role of a file that is about to be read for shards or a tokenizer; None: no collection lists it.

    Raises:
        DataError: the file is for evaluation only, or its collection does not list it.
    """
    path = path.resolve()
    for folder in list(path.parents)[:_LEVELS]:
        roles = _roles(folder)
        if not roles:
            continue
        name = path.relative_to(folder).as_posix()
        role = roles.get(name)
        if role is None:
            raise DataError(f"{path}: {folder / MANIFEST} does not list it; list it with its role, or move it")
        if role == "eval":
            raise DataError(
                f"{path}: an evaluation set ({MANIFEST}: role eval) is never trained on; take it out of the recipe. "
                "To keep its items out of other text, name it under filters.decontaminate.against"
            )
        if role not in ("train", DEV, BY_ROW):
            raise DataError(f"{folder / MANIFEST}: {name}: role {role!r}; valid: train, dev, eval, {BY_ROW}")
        return role  # type: ignore[return-value]
    return None


@cache
def _roles(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    headings = lines[0]
    if "file" not in headings or "role" not in headings:
        return {}
    file, role = headings.index("file"), headings.index("role")
    return {cells[file]: cells[role] for cells in lines[1:]}
