"""muP's coordinate check: at one learning rate, a step moves activations alike at every width.

Yang et al. 2022 (Tensor Programs V), appendix D.1: record how far activations move in the first steps over widths;
under muP the curves are flat, without it they grow with the width.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hcx.data.batch import MicroBatch
from hcx.engine.base import StepBatch
from hcx.engine.common import plain_meta
from hcx.engine.config import TorchEngineConfig
from hcx.engine.torch_engine import TorchEngine
from hcx.errors import ConfigError
from hcx.model.weights import InitWeights
from hcx.optim import MuP, OptimConfig, parameter_groups
from hcx.recipe import check_recipe, load_train_recipe
from hcx.testing.batches import packed_rows
from hcx.testing.tiny import tiny_config
from hcx.train import NextToken

WIDTHS = (32, 64, 128, 256)
BASE = 32
STEPS = 4
LR = 3e-3
VOCAB, SEQ, HEAD = 256, 32, 16
FLAT = 0.15
"""Largest slope, in powers of the width, that counts as constant; small widths give down to -0.11."""
GROWS = 0.3
"""Slope of what grows: the theory says 0.5 to 1, these widths give 0.44 and more."""


def movement(width: int, multipliers: bool, rates: bool, seed: int) -> dict[str, float]:
    """Root mean square of how far each activation moved in a few steps."""
    ratio = width / BASE if multipliers else 1.0
    options: dict[str, Any] = {
        "use_post_norm": False,
        "residual_multiplier": 1.0,
        "attention_multiplier": HEAD**-0.5,
        "embedding_multiplier": 4.0 * math.sqrt(ratio),
        "logits_scaling": 1.0 / math.sqrt(ratio),
        # Of variance 1 / fan-in, the usual one, in every case.
        "initializer_range": 1.0 / math.sqrt(width),
    }
    config = tiny_config(
        "hyperclovax",
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_heads=width // HEAD,
        num_kv_heads=width // HEAD,
        **options,
    )
    optim = OptimConfig(lr=LR, eps=1e-12, weight_decay=0.0, mup=MuP(width=width, base_width=BASE) if rates else None)
    engine = TorchEngine(
        engine_config=TorchEngineConfig(),
        model_config=config,
        optim_config=optim,
        weights=InitWeights(config, seed),
    )
    batch = packed_rows(8, SEQ, VOCAB, seed=seed, max_document=SEQ)
    before = activations(engine, batch)
    for step in range(STEPS):
        engine.train_step(StepBatch(step, [batch]), NextToken(), 1.0)
    after = activations(engine, batch)
    return {name: float((after[name] - before[name]).pow(2).mean().sqrt()) for name in before}


@torch.no_grad()
def activations(engine: TorchEngine, batch: MicroBatch) -> dict[str, Tensor]:
    """The residual stream's parts, and the logits of the labels.

    Logits of other tokens move at random, by less the wider the model is, until the number of rows is the smaller.
    """
    found: dict[str, Tensor] = {}
    handles = [
        sublayer.register_forward_hook(
            lambda module, inputs, output, name=f"sublayer {number}": found.update({name: output.clone()})
        )
        for number, sublayer in enumerate(engine._decoder.sublayers)
    ]
    hidden = engine._decoder(batch.tokens, plain_meta(batch))
    found["logits"] = engine._decoder.output(hidden).logits().gather(-1, batch.labels[..., None])
    for handle in handles:
        handle.remove()
    return found


def slopes(multipliers: bool, rates: bool) -> dict[str, float]:
    """Exponent of the width in each activation's movement, by least squares over the widths, three seeds."""
    x = torch.tensor([math.log2(width) for width in WIDTHS])
    moved = [[movement(width, multipliers, rates, seed) for seed in range(3)] for width in WIDTHS]
    result = {}
    for name in moved[0][0]:
        y = torch.tensor([sum(math.log2(run[name]) for run in runs) / len(runs) for runs in moved])
        result[name] = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).pow(2).sum())
    return result


def test_activations_move_alike_at_every_width_with_mup() -> None:
    found = slopes(multipliers=True, rates=True)
    assert all(abs(slope) < FLAT for slope in found.values()), found


@pytest.mark.parametrize(("multipliers", "rates"), [(False, False), (True, False), (False, True)])
def test_activations_move_otherwise_at_every_width_without_either_half_of_it(multipliers: bool, rates: bool) -> None:
    found = slopes(multipliers, rates)
    assert any(abs(slope) > GROWS for slope in found.values()), found
    if not rates:
        assert all(slope > GROWS for slope in found.values()), found


def test_rates_by_width_are_those_of_the_table() -> None:
    shapes = {
        "model.embed_tokens.weight": (100, 256),
        "model.layers.0.self_attn.q_proj.weight": (256, 256),
        "model.layers.0.mlp.down_proj.weight": (256, 512),
        "model.norm.weight": (256,),
        "lm_head.weight": (100, 256),
    }
    groups = parameter_groups(shapes, OptimConfig(mup=MuP(width=256, base_width=64)))
    rates = {name: group.lr_mult for group in groups for name in group.names}
    assert rates == {
        "model.embed_tokens.weight": 0.5,
        "model.layers.0.self_attn.q_proj.weight": 0.25,
        "model.layers.0.mlp.down_proj.weight": 0.25,
        "model.norm.weight": 1.0,
        "lm_head.weight": 0.5,
    }


def test_a_width_that_is_not_the_models_and_another_optimizer_are_refused() -> None:
    overrides = ["optim={kind: adamw, mup: {width: 512, base_width: 64}}"]
    with pytest.raises(ConfigError, match=r"optim.mup.width = 512: must be model.hidden_size = 256"):
        check_recipe(load_train_recipe("launch/train/demo.yaml", overrides))
    with pytest.raises(ConfigError, match="mup with kind = muon"):
        load_train_recipe("launch/train/demo.yaml", ["optim.mup={width: 256, base_width: 64}"])
