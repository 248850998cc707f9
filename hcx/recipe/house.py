"""The house model: made from its recipes, found again by their digests, and measured.

A small model that everybody can train in an hour, on Korean, English and code in equal parts, from one seed: the
standing model for claims about Korean, where a published one of this size does not exist.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hcx.artifacts import digest_file, find_resource, is_complete, read_manifest
from hcx.artifacts.manifest import MANIFEST
from hcx.config import load_config
from hcx.data import DataRecipe
from hcx.data.build import build_shards
from hcx.data.fetch import PERMISSIVE, fetch
from hcx.errors import CheckpointError, DataError
from hcx.obs import get_logger
from hcx.recipe.finished import require_made_from
from hcx.recipe.run import run_training
from hcx.recipe.train import TrainRecipe, load_train_recipe
from hcx.train.ledger import FOLDER as LEDGER

log = get_logger(__name__)

Variant = Literal["house", "plain", "no-fim"]
VARIANTS: tuple[Variant, ...] = ("house", "plain", "no-fim")


@dataclass(frozen=True)
class House:
    """Where the house model and those it is compared with lie.

    Attributes:
        out: the house model's directory; the others lie beside it, named after it.
        text: the permissive text.
    """

    out: Path
    text: Path

    def run(self, variant: Variant) -> Path:
        """A variant's directory."""
        return self.out if variant == "house" else self.out.with_name(f"{self.out.name}-{variant}")

    def shards(self, variant: Variant) -> Path:
        """What a variant is trained on: the plain one's tokenizer is its own."""
        return self.run("plain" if variant == "plain" else "house") / "shards"

    def model(self, variant: Variant) -> Path:
        """A variant's model directory."""
        return self.run(variant) / "model"

    def finished(self, variant: Variant) -> bool:
        """Whether a variant is there, made from the recipe that would make it now."""
        if not is_complete(self.model(variant)):
            return False
        require_made_from(self.model(variant), "model", self.train_recipe(variant))
        return True

    def data_recipe(self, variant: Variant) -> DataRecipe:
        """Text to shards."""
        name = "house-plain" if variant == "plain" else "house"
        return load_config(DataRecipe, find_resource(f"launch/data/{name}.yaml"), [f"root={self.text}"])

    def train_recipe(self, variant: Variant, overrides: Sequence[str] = ()) -> TrainRecipe:
        """Shards to model."""
        name = "house" if variant == "house" else f"house-{variant}"
        places = [f"out={self.run(variant)}", f"data.shards={self.shards(variant)}"]
        return load_train_recipe(find_resource(f"launch/train/{name}.yaml"), [*places, *overrides])

    def make(self, variant: Variant = "house", stop: Callable[[], str | None] | None = None) -> bool:
        """Makes what is missing: text, shards, model. What is there and was made from the same recipes stays.

        Returns:
            False where training was interrupted; the same call goes on.

        Raises:
            CheckpointError: what is there was made from other recipes.
            DataError: packages could not be fetched.
        """
        if not is_complete(self.text):
            if self.text.exists():
                raise DataError(f"{self.text}: exists, and is not the fetched text; name another directory with --text")
            log.info("fetching the permissive text into %s (200 MB of packages)", self.text)
            fetch(PERMISSIVE, self.text)
        shards = self.shards(variant)
        if is_complete(shards):
            require_made_from(shards, "shards", self.data_recipe(variant))
        else:
            build_shards(self.data_recipe(variant), shards, find_resource("launch/data/house.yaml").parent)
        recipe = self.train_recipe(variant)
        if is_complete(self.model(variant)):
            require_made_from(self.model(variant), "model", recipe)
            _same_shards(self.model(variant), shards)
            return True
        return run_training(recipe, stop=stop).finished

    def reproduce(self) -> Reproduction:
        """Trains the first checkpoint interval once more, from nothing, and compares it with the run's own record.

        A segment of the ledger is named by the digest of its losses, gradient norms and sample ids, all in full
        precision; each loss is a function of every weight before it. So equal names mean equal bits.

        Raises:
            CheckpointError: there is no record to compare with, or the second run was interrupted.
        """
        recorded = _first_segment(self.out)
        if recorded is None:
            raise CheckpointError(f"{self.out}: no ledger of a house model here; run hcx house-model first")
        again = self.out.with_name(f"{self.out.name}-again")
        if (again / LEDGER).exists():
            shutil.rmtree(again)
        recipe = self.train_recipe("house", [f"out={again}", "train.validate_every=0"])
        run_training(recipe, "never", lambda: "the first interval is done" if _first_segment(again) else None)
        repeated = _first_segment(again)
        if repeated is None:
            raise CheckpointError(f"{again}: interrupted before its first checkpoint; run the same command again")
        return Reproduction(recipe.train.checkpoint_every, recorded.name, repeated.name)


@dataclass(frozen=True)
class Reproduction:
    """The first interval of the house model's run, and of the same run made again.

    Attributes:
        steps: in the interval.
        recorded: the ledger segment of the run.
        repeated: of the second run.
    """

    steps: int
    recorded: str
    repeated: str

    @property
    def equal(self) -> bool:
        """Whether both are the same, bit for bit."""
        return self.recorded == self.repeated


def _first_segment(run: Path) -> Path | None:
    return next(iter(sorted((run / LEDGER).glob("000001-*.jsonl"))), None)


def _same_shards(model: Path, shards: Path) -> None:
    digest = digest_file(shards / MANIFEST)
    used = {entry.digest for entry in read_manifest(model).inputs if entry.role == "shards"}
    if digest not in used:
        raise CheckpointError(f"{model}: trained on other shards than {shards}; name another --out, or remove it")
