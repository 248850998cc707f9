"""Infilling costs left-to-right modelling nothing, and works: the claim of Bavarian et al. 2022 at a tiny scale.

Same budget with rates 0 and 0.5, three seeds. The text is a form whose second line repeats what the first one says, so
a blank in the first line can be filled from its suffix, and from nothing else.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from hcx.config import load_config
from hcx.data import DataRecipe
from hcx.data.build import build_shards
from hcx.model.load import load_model
from hcx.recipe.infill import Blank, fill
from hcx.recipe.run import run_training
from hcx.recipe.train import load_train_recipe

SEEDS = (1, 2, 3)
STEPS = 1500
MODEL = (
    "{vocab_size: 512, hidden_size: 128, intermediate_size: 256, num_layers: 3, num_heads: 4, num_kv_heads: 4, "
    "max_seq_len: 128, tie_embeddings: true}"
)
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

_NAMES = [a + b for a in "가나다라마바사아자차카타파하" for b in ("람", "온", "빛", "솔", "별", "늘", "샘", "돌")]
_THINGS = ["apple", "river", "stone", "cloud", "lemon", "piano", "tiger", "bread", "maple", "ocean", "robot", "candle"]


def _form(draw: random.Random) -> tuple[str, str, str]:
    name, thing, amount = draw.choice(_NAMES), draw.choice(_THINGS), draw.randrange(100, 1000)
    return f"주문: {name}", f" {thing} {amount}", f" 개를 보냄\n확인: {name} {thing} {amount} 개\n"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    draw = random.Random(0)
    with open(folder / "forms.jsonl", "w", encoding="utf-8") as file:
        for _ in range(6000):
            file.write(json.dumps({"text": "".join(_form(draw))}, ensure_ascii=False) + "\n")
    (folder / "recipe.yaml").write_text(
        "languages: {ko: {share: 1, sources: [{kind: jsonl, path: forms.jsonl}]}}\n"
        "tokenizer: {kind: train, vocab_size: 512}\n"
    )
    build_shards(load_config(DataRecipe, folder / "recipe.yaml", []), folder / "shards", folder)
    return folder / "shards"


def _train(shards: Path, out: Path, seed: int, rate: float) -> float:
    recipe = load_train_recipe(
        ROOT / "launch/train/house.yaml",
        [
            f"out={out}",
            f"seed={seed}",
            f"data.shards={shards}",
            "data.shares=null",
            f"data.fim.rate={rate}",
            "data.seq_len=128",
            f"model={MODEL}",
            f"train.steps={STEPS}",
            "train.global_batch=16",
            "train.micro_batch=16",
            "train.validate_every=0",
            f"train.checkpoint_every={STEPS}",
            "engine.precision=fp32",
        ],
    )
    return run_training(recipe).bits_per_byte["ko"]


def test_left_to_right_is_as_good_with_infilling_and_only_that_model_fills_blanks(shards: Path, tmp_path: Path) -> None:
    draw = random.Random(99)
    cut = [Blank(*_form(draw)) for _ in range(200)]
    bits: dict[float, list[float]] = {0.0: [], 0.5: []}
    exact: dict[float, list[float]] = {0.0: [], 0.5: []}
    for rate in bits:
        for seed in SEEDS:
            out = tmp_path / f"{rate}-{seed}"
            bits[rate].append(_train(shards, out, seed, rate))
            model = load_model(out / "model")
            exact[rate].append(fill(model, "", "ko", 2, cut, "psm").exact[0])
    print("bits per byte", bits, "exact", exact)
    difference = np.mean(bits[0.5]) - np.mean(bits[0.0])
    spread = np.sqrt(np.var(bits[0.0], ddof=1) / len(SEEDS) + np.var(bits[0.5], ddof=1) / len(SEEDS))
    # Student's t with 2 x 3 runs (about 4 degrees of freedom), 95 %; and never more than 2 % of the loss itself.
    assert difference <= max(2.8 * spread, 0.02 * np.mean(bits[0.0]))
    # Copying from the suffix is learnt suddenly, and later by some seeds (measured: 35, 86, 100 %; at most 1 % without
    # infilling): the claim is about the mean, and no seed may look like those that never saw a middle.
    assert np.mean(exact[0.5]) >= np.mean(exact[0.0]) + 0.5
    assert min(exact[0.5]) >= max(exact[0.0]) + 0.2
