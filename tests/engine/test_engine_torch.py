"""The torch engine: the loss is right under every split, masters and state are what the seam says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from hcx.engine.base import StepBatch
from hcx.engine.config import TorchEngineConfig
from hcx.engine.torch_engine import TorchEngine
from hcx.errors import ConfigError
from hcx.model.config import ModelConfig
from hcx.model.meta import ForwardMeta
from hcx.model.transforms import FixedDropMask, ModelTransform
from hcx.model.weights import InitWeights
from hcx.optim import OptimConfig
from hcx.testing.batches import packed_rows, take_rows, unpacked
from hcx.testing.tiny import tiny_config, tiny_decoder
from hcx.train.objectives import NextToken

# fp64-summed losses of fp32 products in another order, relative to the largest gradient.
RELATIVE = 1e-6


def _engine(
    config: ModelConfig,
    optim: OptimConfig | None = None,
    transforms: tuple[ModelTransform, ...] = (),
    **options: object,
) -> TorchEngine:
    return TorchEngine(
        engine_config=TorchEngineConfig(**options),
        model_config=config,
        optim_config=optim or OptimConfig(kind="sgd", lr=0.1, momentum=0.0),
        transforms=transforms,
        weights=InitWeights(config, 5),
        seed=0,
    )


def _gradients(engine: TorchEngine, micro_batches: list) -> tuple[float, dict[str, torch.Tensor]]:
    found: dict[str, torch.Tensor] = {}
    loss = engine.gradients(StepBatch(0, micro_batches), NextToken(), found.__setitem__)
    return loss, found


def _reference_gradients(config: ModelConfig, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """One batch, fp64, plain cross entropy over all logits: independent of the engine and of the chunked loss."""
    from hcx.model.decoder import Decoder
    from hcx.model.parts.base import PlainParts
    from hcx.model.weights import load_weights

    decoder = Decoder(config, PlainParts(torch.float64))
    load_weights(decoder, decoder.parameter_map(), InitWeights(config, 5))
    hidden = decoder(batch.tokens, ForwardMeta(positions=batch.positions, document_ids=batch.document_ids))
    logits = torch.nn.functional.linear(hidden, decoder.output_weight()).transpose(0, 1) * config.logits_scaling
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    weights = batch.weights.double().flatten()
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    parameters = dict(decoder.named_parameters())
    return loss.item(), {
        block.name: block.view(parameters[local].grad)
        for local, blocks in decoder.parameter_map().items()
        for block in blocks
    }


def _close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        difference = (gradient.double() - expected[name].double()).norm() / expected[name].double().norm()
        assert difference < relative, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_equal_an_independent_fp64_reference(architecture: str, tied: bool) -> None:
    config = tiny_config(architecture, tie_embeddings=tied, initializer_range=0.05)
    batch = packed_rows(4, 24, config.vocab_size)
    loss, found = _gradients(_engine(config), [batch])
    expected_loss, expected = _reference_gradients(config, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    _close(found, expected, 5e-6)


@pytest.mark.parametrize("splits", [(1, 1, 1, 1), (2, 2), (3, 1), (1, 3)])
def test_any_split_into_micro_batches_gives_the_gradients_of_the_whole_batch(splits: tuple[int, ...]) -> None:
    config = tiny_config(initializer_range=0.05)
    batch = packed_rows(4, 24, config.vocab_size)
    loss, whole = _gradients(_engine(config), [batch])
    edges = [sum(splits[:index]) for index in range(len(splits) + 1)]
    parts = [take_rows(batch, start, stop) for start, stop in itertools.pairwise(edges)]
    assert len({float(part.weights.sum()) for part in parts}) == len(parts)
    split_loss, found = _gradients(_engine(config), parts)
    assert split_loss == pytest.approx(loss, rel=RELATIVE)
    _close(found, whole, RELATIVE)


def test_packed_rows_give_the_gradients_of_their_documents_one_by_one() -> None:
    config = tiny_config(initializer_range=0.05)
    batch = packed_rows(3, 24, config.vocab_size)
    loss, packed = _gradients(_engine(config), [batch])
    alone_loss, alone = _gradients(_engine(config), unpacked(batch))
    assert alone_loss == pytest.approx(loss, rel=RELATIVE)
    _close(packed, alone, RELATIVE)


def test_activation_checkpointing_changes_no_gradient() -> None:
    config = tiny_config()
    batch = packed_rows(2, 16, config.vocab_size)
    _, plain = _gradients(_engine(config), [batch])
    _, recomputed = _gradients(_engine(config, activation_checkpointing=True), [batch])
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_gradients_disturb_nothing() -> None:
    config = tiny_config()
    optim = OptimConfig(lr=1e-2)
    batches = [StepBatch(step, [packed_rows(2, 16, config.vocab_size, seed=step)]) for step in range(3)]
    straight, probed = _engine(config, optim), _engine(config, optim)
    for batch in batches:
        straight.train_step(batch, NextToken(), 1.0)
        random_state = torch.get_rng_state()
        _gradients(probed, [packed_rows(2, 16, config.vocab_size, seed=9)])
        assert torch.equal(torch.get_rng_state(), random_state)
        probed.train_step(batch, NextToken(), 1.0)
    for (name, left), (_, right) in zip(straight.export_state(), probed.export_state(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_training_reduces_the_loss_in_either_precision(precision: str, kind: str) -> None:
    config = tiny_config(initializer_range=0.02)
    engine = _engine(
        config, OptimConfig(kind=kind, lr=0.3 if kind == "sgd" else 5e-3, momentum=0.9), precision=precision
    )
    batch = replace(packed_rows(4, 16, config.vocab_size), weights=torch.ones(4, 16))
    losses = [engine.train_step(StepBatch(step, [batch]), NextToken(), 1.0).loss for step in range(20)]
    assert losses[-1] < losses[0] - 1.0


def test_bf16_keeps_masters_that_small_updates_still_move() -> None:
    config = tiny_config()
    engine = _engine(config, OptimConfig(kind="sgd", lr=1e-6, momentum=0.0, weight_decay=0.0), precision="bf16")
    before = dict(engine.export_state())
    engine.train_step(StepBatch(0, [packed_rows(2, 16, config.vocab_size)]), NextToken(), 1.0)
    after = dict(engine.export_state())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert after[name].dtype == torch.float32
    assert not torch.equal(before[name], after[name])
    # The update is far below bf16's resolution of the weights.
    assert (
        torch.equal(before[name].bfloat16(), after[name].bfloat16()) or (before[name] - after[name]).abs().max() < 1e-5
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_edited_masters_reach_the_next_forward(precision: str) -> None:
    config = tiny_config()
    engine = _engine(config, precision=precision)
    batch = packed_rows(2, 16, config.vocab_size)
    before = engine.score([batch], lambda output, mb: output.token_logprobs(mb.labels))[0]
    name = "model.layers.1.mlp.up_proj.weight"
    seen: list[torch.Tensor] = []

    def double(found: str, master: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        assert found == name
        seen.append(master.clone())
        return master * 2

    engine.edit_masters([name], double)
    after = engine.score([batch], lambda output, mb: output.token_logprobs(mb.labels))[0]
    assert not torch.allclose(before, after)
    assert torch.equal(dict(engine.export_state())[name], seen[0] * 2)
    with pytest.raises(ConfigError, match="up_proj"):
        engine.edit_masters(["model.layers.1.mlp.up_prj.weight"], double)


def test_a_dropped_sublayer_gets_no_gradient_and_leaves_the_forward_whole() -> None:
    config = tiny_config()
    batch = packed_rows(2, 16, config.vocab_size)
    mask = (False, True, True, False)
    masked_loss, masked = _gradients(_engine(config, transforms=(FixedDropMask(lambda step, index: mask),)), [batch])
    loss, full = _gradients(_engine(config), [batch])
    assert masked_loss == loss
    for name in full:
        dropped = ".layers.0.mlp" in name or ".layers.1.self_attn" in name
        dropped |= name.endswith(("layers.0.post_attention_layernorm.weight", "layers.1.input_layernorm.weight"))
        assert bool(masked[name].abs().sum() == 0) == dropped, name


def test_a_missing_gradient_is_a_zero_gradient_or_is_skipped_by_option() -> None:
    config = tiny_config()
    optim = OptimConfig(lr=1e-2, weight_decay=0.5)
    transforms = (FixedDropMask(lambda step, index: (False, True, False, False)),)
    name = "model.layers.0.mlp.up_proj.weight"
    batch = StepBatch(0, [packed_rows(2, 16, config.vocab_size)])
    for missing, moves in (("zero", True), ("skip", False)):
        engine = _engine(config, optim, transforms, missing_gradients=missing)
        before = dict(engine.export_state())[name]
        engine.train_step(batch, NextToken(), 1.0)
        # A zero gradient still decays the weight.
        assert (not torch.equal(before, dict(engine.export_state())[name])) == moves


def test_a_step_without_weight_or_with_a_non_finite_gradient_changes_nothing() -> None:
    config = tiny_config()
    engine = _engine(config)
    before = dict(engine.export_state())
    batch = packed_rows(2, 16, config.vocab_size)
    empty = engine.train_step(StepBatch(0, [replace(batch, weights=torch.zeros(2, 16))]), NextToken(), 1.0)
    infinite = engine.train_step(
        StepBatch(0, [replace(batch, weights=torch.full((2, 16), float("inf")))]), NextToken(), 1.0
    )
    assert empty.skipped
    assert infinite.skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.export_state())


def test_clipping_scales_the_update_to_the_limit() -> None:
    config = tiny_config()
    optim = OptimConfig(kind="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    batch = StepBatch(0, [packed_rows(2, 16, config.vocab_size)])
    clipped, free = _engine(config, optim, clip_grad_norm=0.01), _engine(config, optim, clip_grad_norm=0.0)
    before = dict(clipped.export_state())
    norm = clipped.train_step(batch, NextToken(), 1.0).grad_norm
    assert norm == pytest.approx(free.train_step(batch, NextToken(), 1.0).grad_norm)
    assert norm > 0.01
    moved = sum((before[name] - tensor).double().square().sum() for name, tensor in clipped.export_state()) ** 0.5
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_is_imposed_every_step() -> None:
    config = tiny_config()
    engine = _engine(config, OptimConfig(lr=1e-2))
    before = dict(engine.export_state())
    engine.train_step(StepBatch(0, [packed_rows(2, 16, config.vocab_size)]), NextToken(), 0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.export_state())


def test_a_tiny_decoder_is_random_enough_to_compare() -> None:
    decoder = tiny_decoder(tiny_config())
    with torch.no_grad():
        logits = decoder.output(decoder(torch.arange(8)[None], ForwardMeta())).logits()
    assert logits.std() > 0.1
