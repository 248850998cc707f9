"""Trees of source files: which files are the project's own, and under which licence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from hcx.data.document import Document
from hcx.data.shipped import name_fraction
from hcx.data.source_config import CodeSource
from hcx.errors import DataError

VENDORED = frozenset(
    {
        "node_modules",
        "vendor",
        "vendored",
        "third_party",
        "thirdparty",
        "3rdparty",
        "extern",
        "external",
        "site-packages",
        "dist-packages",
        "bower_components",
        "__pycache__",
        "build",
        "dist",
        "venv",
        "_vendor",
    }
)
"""Folders that hold copies of other projects, or what a build made."""

UNKNOWN = "unknown"
_LICENCE_FILE = re.compile(r"(?:licen[cs]e|copying|unlicense)(?:[-._].*)?", re.IGNORECASE)
_LICENCES = (
    ("Apache-2.0", r"Apache License,?\s+Version 2\.0"),
    ("AGPL-3.0", r"GNU AFFERO GENERAL PUBLIC LICENSE"),
    ("LGPL", r"GNU (?:LESSER|LIBRARY) GENERAL PUBLIC LICENSE"),
    ("GPL-3.0", r"GNU GENERAL PUBLIC LICENSE\s+Version 3"),
    ("GPL-2.0", r"GNU GENERAL PUBLIC LICENSE\s+Version 2"),
    ("MPL-2.0", r"Mozilla Public License,?\s+(?:Version|v\.?) ?2\.0"),
    ("MIT", r"Permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("BSD-3-Clause", r"Redistribution and use in source and binary forms.*Neither the name"),
    ("BSD-2-Clause", r"Redistribution and use in source and binary forms"),
    ("PSF-2.0", r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2"),
    ("Unlicense", r"This is free and unencumbered software released into the public domain"),
)
"""By telling phrases; the first that is found."""


def licence_of(text: str) -> str:
    """The SPDX name of a licence text, or `unknown`."""
    for name, pattern in _LICENCES:
        if re.search(pattern, text[:20_000], re.IGNORECASE | re.DOTALL):
            return name
    return UNKNOWN


def code_files(source: CodeSource, root: Path) -> Iterator[tuple[str, str]]:
    """(path below the root, licence) of every file, in no particular order.

    The licence is that of the nearest licence file at or above it, within the tree.
    """
    left_out = VENDORED | set(source.skip)
    licences: dict[str, str] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        here = Path(folder).relative_to(root).as_posix()
        inherited = licences.get(Path(here).parent.as_posix(), UNKNOWN) if here != "." else UNKNOWN
        own = sorted(name for name in files if _LICENCE_FILE.fullmatch(name) and not name.endswith((".py", ".js")))
        for name in own:
            found = licence_of((Path(folder) / name).read_text(encoding="utf-8", errors="replace"))
            inherited = found if found != UNKNOWN else inherited
        licences[here] = inherited
        for name in files:
            path = Path(folder) / name
            if name.endswith(source.suffixes) and not name.startswith(".") and not path.is_symlink():
                yield path.relative_to(root).as_posix(), inherited


def read_code(source: CodeSource, folder: Path) -> Iterator[Document]:
    """The files of a tree as documents, in the order of the hashes of their paths.

    The order does not depend on the file system's, and a byte budget takes files from everywhere. The source's name
    is the tree's with the licence, so that counts and factors are per licence. Files that are not UTF-8 are left out:
    in a tree of code they are data.

    Raises:
        DataError: no such folder, or no file in it.
    """
    root = folder / source.path
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    files = sorted(code_files(source, root), key=lambda item: (name_fraction(item[0]), item[0]))
    if not files:
        raise DataError(f"{root}: no file ends with {', '.join(source.suffixes)}; set the source's `suffixes`")
    fewest, most = source.characters
    for name, licence in files:
        if source.licences is not None and licence not in source.licences:
            continue
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if fewest <= len(text) <= most:
            yield Document(text, f"{root.name} ({licence})", name, None, licence, source.upsample)
