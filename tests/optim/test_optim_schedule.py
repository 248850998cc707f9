"""Schedules are pure functions of the step; groups follow the rules."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcx.optim import GroupRule, OptimConfig, Schedule, lr_factor, parameter_groups

SHAPES = {
    "model.embed_tokens.weight": (32, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "lm_head.weight": (32, 8),
}


def test_wsd_warms_up_stays_and_decays() -> None:
    schedule = Schedule(kind="wsd", warmup_steps=4, decay_fraction=0.2, min_factor=0.0)
    factors = [lr_factor(schedule, step, 100) for step in range(100)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:80]) == {1.0}
    assert factors[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])


def test_cosine_reaches_its_floor_at_the_end() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=10, min_factor=0.1)
    assert lr_factor(schedule, 10, 110) == pytest.approx(1.0)
    assert lr_factor(schedule, 60, 110) == pytest.approx(0.55)
    assert lr_factor(schedule, 110, 110) == pytest.approx(0.1)


@given(
    kind=st.sampled_from(["wsd", "cosine", "constant"]),
    warmup=st.integers(0, 50),
    total=st.integers(1, 300),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_factors_lie_between_zero_and_one_and_never_rise_after_the_warm_up(
    kind: str, warmup: int, total: int, floor: float, decay: float
) -> None:
    schedule = Schedule(kind=kind, warmup_steps=warmup, min_factor=floor, decay_fraction=decay)
    factors = [lr_factor(schedule, step, total) for step in range(total)]
    assert all(0 <= factor <= 1 + 1e-9 for factor in factors)
    after = factors[warmup:]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(after))


def test_vectors_do_not_decay_and_muon_leaves_embeddings_to_adamw() -> None:
    groups = parameter_groups(SHAPES, OptimConfig(kind="muon", weight_decay=0.1))
    update = {name: group.update for group in groups for name in group.names}
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert update["model.layers.0.self_attn.q_proj.weight"] == "muon"
    assert update["model.embed_tokens.weight"] == update["lm_head.weight"] == "adamw"
    assert decay["model.layers.0.input_layernorm.weight"] == 0.0
    assert decay["model.embed_tokens.weight"] == 0.1


def test_the_first_matching_rule_holds() -> None:
    rules = (
        GroupRule(pattern="*embed*", lr_mult=3.0, weight_decay=0.0, clip_group="embeddings"),
        GroupRule(pattern="*", lr_mult=0.5),
    )
    groups = parameter_groups(SHAPES, OptimConfig(rules=rules))
    by_name = {name: group for group in groups for name in group.names}
    embedding = by_name["model.embed_tokens.weight"]
    assert (embedding.lr_mult, embedding.weight_decay, embedding.clip_group) == (3.0, 0.0, "embeddings")
    assert by_name["lm_head.weight"].lr_mult == 0.5
    assert [name for group in groups for name in group.names].count("lm_head.weight") == 1
