"""Scores translations where unbabel-comet is installed. Run there as text; it imports nothing of hcx.

Arguments: weights, file of `{src, mt, ref}` lines, file to write the list of scores to, number of GPUs.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

BATCH_SIZE = 8


def main() -> None:
    """Reads the rows, scores them, writes one number for each."""
    weights, rows_file, scores_file, gpus = sys.argv[1:]
    comet: Any = importlib.import_module("comet")
    rows = [json.loads(line) for line in Path(rows_file).read_text(encoding="utf-8").splitlines()]
    model = comet.load_from_checkpoint(weights)
    found = model.predict(rows, batch_size=BATCH_SIZE, gpus=int(gpus), progress_bar=False)
    Path(scores_file).write_text(json.dumps([float(score) for score in found.scores]), encoding="utf-8")


if __name__ == "__main__":
    main()
