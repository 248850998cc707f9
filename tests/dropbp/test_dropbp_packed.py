"""Low-rank updates over a frozen binary-coded base, with dropped backward passes (the QLoRA case)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hcx.compress import CompressPlan, compress_model
from hcx.compress.alphatuning import AlphaTuning, AlphaTuningConfig, tuned_stems
from hcx.compress.plan import ModulePlan, PlanRule
from hcx.dist import Topology
from hcx.dropbp import DropBP, DropBPConfig, StepCosts, Trained
from hcx.dropbp.masks import Mask
from hcx.engine.base import StepBatch
from hcx.engine.build import build_engine
from hcx.engine.config import TorchEngineConfig
from hcx.model.adapters import LoRA, LoRAConfig
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.load import ModelFiles
from hcx.model.meta import ForwardMeta
from hcx.model.parts.base import PlainParts
from hcx.model.transforms import ModelTransform, TransformContext
from hcx.model.weights import TensorWeights, load_weights
from hcx.optim import OptimConfig
from hcx.recipe.adapt import PackedBase
from hcx.testing.batches import packed_rows, take_rows
from hcx.testing.tiny import tiny_model_directory
from hcx.train import NextToken

ADAPTER = LoRAConfig(rank=4, alpha=8.0)
MASKS: list[Mask | None] = [None, (True, False, False, True), (False, True, True, True), (True, True, True, False)]


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binary-coded model whose fused q/k/v is partly dense."""
    path = tmp_path_factory.mktemp("packed")
    tiny_model_directory(path / "base")
    plan = CompressPlan(default=ModulePlan(bits=3, group_size=32), rules=(PlanRule(pattern="*.v_proj", keep=True),))
    compress_model(path / "base", path / "coded", plan)
    return path / "coded"


def adapted(coded: Path) -> Decoder:
    with ModelFiles(coded) as files:
        config = files.config
        decoder = Decoder(config, PlainParts())
        load_weights(decoder, decoder.parameter_map(), TensorWeights(files.weight, str(coded)))
    context = TransformContext(config, Topology())
    PackedBase(str(coded)).apply(decoder, context)
    LoRA(ADAPTER, 0).apply(decoder, context)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "lora_b" in name:  # zero at first, so that no gradient would reach A
                parameter.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return decoder


def loss(decoder: Decoder, mask: Mask | None) -> Tensor:
    batch = packed_rows(2, 16, decoder.config.vocab_size, seed=2)
    meta = ForwardMeta(batch.positions, batch.document_ids, dropbp_mask=mask)
    logits = decoder.output(decoder(batch.tokens, meta)).logits()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_forward_is_the_same_and_gradients_are_those_of_constant_branches(
    coded: Path, mask: Mask, checkpointing: bool
) -> None:
    decoder = adapted(coded)
    decoder.activation_checkpointing = checkpointing
    whole, dropped = loss(decoder, None), loss(decoder, mask)
    assert torch.equal(whole, dropped)
    dropped.backward()
    found = {name: p.grad for name, p in decoder.named_parameters() if p.requires_grad}
    # The reference: outputs of dropped branches computed before, and put in as constants.
    outputs: dict[int, Tensor] = {}
    hooks = [s.register_forward_hook(lambda m, args, out: outputs.__setitem__(m.index, out)) for s in decoder.sublayers]
    with torch.no_grad():
        loss(decoder, None)
    for hook in hooks:
        hook.remove()
    for sublayer, bit in zip(decoder.sublayers, mask, strict=True):
        if bit:
            sublayer.forward = lambda *args, kept=outputs[sublayer.index]: kept  # type: ignore[method-assign]
    decoder.zero_grad()
    loss(decoder, None).backward()
    for name, parameter in decoder.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        index = int(name.split(".")[1])
        assert (found[name] is None) == mask[index], name
        if not mask[index]:
            assert torch.equal(found[name], parameter.grad), name  # type: ignore[arg-type]
            assert found[name].abs().max() > 0, name  # type: ignore[union-attr]


def tuned(config: ModelConfig, coded: Path, kind: str) -> tuple[list[ModelTransform], Trained]:
    """Transforms before DropBP, and what they train."""
    if kind == "scales":
        with ModelFiles(coded) as files:
            stems = frozenset(tuned_stems(AlphaTuningConfig(), files))
        return [AlphaTuning(AlphaTuningConfig(), str(coded))], Trained(everything=False, matrices=stems)
    return [PackedBase(str(coded)), LoRA(ADAPTER, 0)], Trained.updates(ADAPTER, config)


@pytest.mark.parametrize("kind", ["updates", "scales"])
def test_training_with_drops_moves_what_is_trained_only_and_lowers_the_loss(coded: Path, kind: str) -> None:
    with ModelFiles(coded) as files:
        config, weights = files.config, TensorWeights(files.weight, str(coded))
        transforms, trained = tuned(config, coded, kind)
        dropbp = DropBP(
            DropBPConfig(rate=0.5, probe_at=0.2), config, steps=20, seed=0, trained=trained, checkpointing=True
        )
        engine = build_engine(
            TorchEngineConfig(activation_checkpointing=True),
            config,
            OptimConfig(lr=2e-2, eps=1e-3),
            [*transforms, dropbp],
            weights,
            0,
        )
    before = {name: tensor.clone() for name, tensor in engine.export_state()}
    rows, losses = packed_rows(4, 16, config.vocab_size, seed=3), []
    for step in range(20):
        batches = [take_rows(rows, 0, 2), take_rows(rows, 2, 4)]
        dropbp.before_step(step)
        dropbp.probe(
            step,
            lambda visit, rows=1, step=step, batch=batches[0]: engine.gradients(
                StepBatch(step, [batch.heaviest(rows)]), NextToken(), visit
            ),
        )
        losses.append(engine.train_step(StepBatch(step, batches), NextToken(), 1.0).loss)
        metrics = dropbp.after_step(step, engine)
        assert metrics["dropbp/rate"] == 0.5
        assert 0.1 < metrics["dropbp/flops_saved"] < 0.6
    assert losses[-1] < 0.95 * losses[0]
    assert len(dropbp.sensitivity) == 4
    after = dict(engine.export_state())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    suffix = ".scales.0" if kind == "scales" else ".lora_"
    assert moved == {name for name in before if suffix in name}
    assert moved


def test_operations_of_tuned_scales_are_those_counted(coded: Path) -> None:
    with ModelFiles(coded) as files:
        config = files.config
        decoder = Decoder(config, PlainParts())
        load_weights(decoder, decoder.parameter_map(), TensorWeights(files.weight, str(coded)))
    (method,), trained = tuned(config, coded, "scales")
    method.apply(decoder, TransformContext(config, Topology()))
    costs = StepCosts(config, 16, trained, attended=1.0)
    for mask in MASKS:
        with sdpa_kernel(SDPBackend.MATH):
            value = loss(decoder, mask)
            with FlopCounterMode(display=False) as counter:
                value.backward()
        assert counter.get_total_flops() / (2 * 16) == costs.backward(mask or (False,) * 4), mask
