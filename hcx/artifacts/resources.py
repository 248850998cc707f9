"""Finds the data folders (`launch/`, `evals/`, `tokenizer/`, `slurm/`) in a checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

import hcx
from hcx.errors import HcxError, did_you_mean

FOLDERS = ("launch", "evals", "tokenizer", "slurm")
_PACKAGE = Path(hcx.__file__).resolve().parent


def _roots() -> list[Path]:
    # The checkout first: in an editable install the packaged folders are empty.
    roots = [_PACKAGE.parent] if (_PACKAGE.parent / "pyproject.toml").is_file() else []
    return [*roots, _PACKAGE / "_resources"]


def find_resource(name: str, folder: str = "") -> Path:
    """The path of a shipped file or folder, such as `launch/demo.yaml`.

    Args:
        name: of the file, from the root of a checkout.
        folder: where such files lie; the error then lists these only.

    Raises:
        HcxError: nothing of that name is shipped.
    """
    for root in _roots():
        if (root / name).exists():
            return root / name
    # Of a name outside them, every shipped file is a candidate; the folder itself may hold anything.
    parent = Path(name).parent
    folders = (str(parent),) if parent.parts[:1] and parent.parts[0] in FOLDERS else FOLDERS
    shipped = [found for known in ((folder,) if folder else folders) for found in resource_names(known)]
    raise HcxError(f"{name}: no such file, and not shipped with hcx; {did_you_mean(name, shipped)}")


def find_file(name: str | Path, folder: str = "") -> Path:
    """A file that a user names: their own path first, else one that ships with hcx under this name.

    Args:
        name: a path, or the name of a shipped file.
        folder: where shipped files of this kind lie.

    Raises:
        HcxError: neither exists.
    """
    path = Path(name)
    if path.exists():
        return path
    if path.is_absolute():
        raise HcxError(f"{path}: no such file")
    return find_resource(str(name), folder)


def resource_names(folder: str, suffix: str = ".yaml") -> list[str]:
    """The shipped files of a folder, as names that `find_resource` accepts."""
    for root in _roots():
        base = root / folder
        if base.is_dir():
            return sorted(str(p.relative_to(root)) for p in base.rglob(f"*{suffix}"))
    return []
