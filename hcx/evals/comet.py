"""COMET (Rei et al. 2020) and its successors for translations, where their weights are at hand.

The package unbabel-comet asks for older releases of transformers than the rest of the evaluation does, so it runs in
an interpreter of its own. Weights are a file of the user's; none are shipped or downloaded. A translation that could
not be scored ends the run.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hcx.artifacts import digest_file
from hcx.errors import EvalError

WEIGHTS, PYTHON = "HCX_COMET_MODEL", "HCX_COMET_PYTHON"
"""Environment: the checkpoint's file, and the interpreter that has unbabel-comet (this one if not given)."""

PROGRAM = Path(__file__).with_name("comet_program.py")

Triple = tuple[str, str, str]
"""Source, translation, reference."""


class TranslationScorer(Protocol):
    """What the translation tasks need of a learned metric."""

    @property
    def identity(self) -> str:
        """The weights' name and digest: goes beside every score."""

    def score(self, triples: Sequence[Triple]) -> list[float]:
        """A number for each translation, higher is better.

        Raises:
            EvalError: a translation could not be scored.
        """


class CometScorer:
    """A checkpoint of COMET's, run by an interpreter that has its package.

    Args:
        weights: the checkpoint's file.
        python: the interpreter.

    Raises:
        EvalError: one of them is not there, or the interpreter lacks the package.
    """

    def __init__(self, weights: Path, python: str) -> None:
        if not weights.is_file():
            raise EvalError(f"{WEIGHTS} = {weights}: no such file; name a checkpoint of COMET's, such as model.ckpt")
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('comet') is None)"
        try:
            absent = subprocess.run([python, "-c", look], capture_output=True, check=False).returncode
        except OSError as error:
            raise EvalError(f"{PYTHON} = {python}: {error.strerror}; name an interpreter") from None
        if absent:
            raise EvalError(
                f"{WEIGHTS} is set, but {python} does not have COMET; in an environment of its own (it asks for older "
                f"packages than hcx does): pip install unbabel-comet, then {PYTHON}=THAT/bin/python"
            )
        self._weights, self._python = weights, python
        self.identity = f"{weights.name} {digest_file(weights)}"

    def score(self, triples: Sequence[Triple]) -> list[float]:
        """Scores in the order of the triples; nothing is asked of a network."""
        with tempfile.TemporaryDirectory(prefix="hcx-comet-") as folder:
            rows, scores = Path(folder) / "rows.jsonl", Path(folder) / "scores.json"
            lines = (json.dumps({"src": src, "mt": mt, "ref": ref}, ensure_ascii=False) for src, mt, ref in triples)
            rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            # As text: a program run by its path finds the modules beside it first, and one of ours is called comet.
            program = PROGRAM.read_text(encoding="utf-8")
            command = [self._python, "-c", program, str(self._weights.resolve()), str(rows), str(scores), str(_gpus())]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
            if done.returncode or not scores.is_file():
                raise EvalError(f"COMET did not score the translations:\n{done.stderr.strip()[-1000:]}")
            found = [float(score) for score in json.loads(scores.read_text(encoding="utf-8"))]
        if len(found) != len(triples) or not all(map(math.isfinite, found)):
            raise EvalError(f"COMET gave {len(found)} scores for {len(triples)} translations, or one that is no number")
        return found


def _gpus() -> int:
    import torch

    return int(torch.cuda.is_available())


def chosen_scorer() -> TranslationScorer | None:
    """The scorer that the environment names, or None where it names none.

    Raises:
        EvalError: what it names cannot be used.
    """
    weights = os.environ.get(WEIGHTS)
    return CometScorer(Path(weights), os.environ.get(PYTHON) or sys.executable) if weights else None


WHY_NONE = f"no weights are named: {WEIGHTS}=FILE.ckpt (docs/evaluation.md, Translation by COMET)"
"""What results say where nothing is named."""
