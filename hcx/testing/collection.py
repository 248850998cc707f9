"""The collection of data sets that may lie beside a checkout."""

from __future__ import annotations

import os
from pathlib import Path

import hcx

VARIABLE = "HCX_SHARED_DATA"


def shared_data() -> Path | None:
    """Its folder: what HCX_SHARED_DATA names, else `../shared/data` beside the checkout; None if it is not there."""
    named = os.environ.get(VARIABLE)
    folder = Path(named) if named else Path(hcx.__file__).resolve().parents[2] / "shared" / "data"
    return folder if (folder / "MANIFEST.tsv").is_file() else None
