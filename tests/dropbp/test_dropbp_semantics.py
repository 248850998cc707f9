"""What dropping means, exactly, on the project's decoder and on an unmodified transformers Llama.

Independent reference: the same forward with every dropped branch replaced by a constant that was computed before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hcx.dist import Topology
from hcx.dropbp import DropBP, DropBPConfig, StepCosts, SwitchedBranches, Trained, switched
from hcx.dropbp.masks import Mask
from hcx.errors import ConfigError
from hcx.model.adapters import LoRA, LoRAConfig
from hcx.model.config import ModelConfig
from hcx.model.convert.branches import residual_blocks
from hcx.model.convert.peer import transformers_model
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.transforms import TransformContext
from hcx.testing.batches import packed_rows
from hcx.testing.tiny import tiny_config, tiny_decoder

SEQ, ROWS = 12, 2
CONFIG = tiny_config(num_layers=3)
MASKS: list[Mask] = [
    (False, True, False, False, True, False),
    (True, True, False, True, True, True),
    (True, False, True, False, False, True),
]
ALL = (True,) * 6


@dataclass
class Subject:
    """A model under test, with one way of calling it whatever it is.

    Attributes:
        module: the model.
        run: mask -> logits `[batch, seq, vocab]`.
        branches: the modules of each residual branch.
        checkpointing: turns activation checkpointing on.
        use_detach: chooses the published mechanism.
        first, last: the residual stream before the first and after the last sublayer, of the last `run`.
    """

    module: nn.Module
    run: Callable[[Mask | None], Tensor]
    branches: list[nn.ModuleList]
    checkpointing: Callable[[], None]
    use_detach: Callable[[], None]
    stream: list[Tensor]

    def gradients(self, mask: Mask | None) -> dict[str, Tensor | None]:
        self.module.zero_grad(set_to_none=True)
        loss(self.run(mask)).backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.module.named_parameters()}

    def dropped_names(self, mask: Mask) -> set[str]:
        gone = {id(p) for branch, bit in zip(self.branches, mask, strict=True) if bit for p in branch.parameters()}
        return {name for name, p in self.module.named_parameters() if id(p) in gone}


def tokens() -> Tensor:
    return packed_rows(ROWS, SEQ, CONFIG.vocab_size, seed=1).tokens


def loss(logits: Tensor) -> Tensor:
    labels = packed_rows(ROWS, SEQ, CONFIG.vocab_size, seed=1).labels
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def transform(rate: float = 0.5, **options: Any) -> DropBP:
    return DropBP(DropBPConfig(rate=rate, **options), CONFIG, steps=10, seed=0)


def ours(config: ModelConfig = CONFIG, dropout: float = 0.0, **options: Any) -> Subject:
    decoder = tiny_decoder(config)
    with_dropout(decoder.sublayers, dropout)
    transform(**options).apply(decoder, TransformContext(config, Topology()))
    stream: list[Tensor] = []

    def run(mask: Mask | None) -> Tensor:
        stream.clear()
        return decoder.output(decoder(tokens(), ForwardMeta(dropbp_mask=mask))).logits()

    first, last = decoder.sublayers[0], decoder.norm
    assert last is not None
    first.register_forward_pre_hook(lambda module, args: stream.append(args[0]))
    last.register_forward_pre_hook(lambda module, args: stream.append(args[0]))
    return Subject(
        decoder,
        run,
        [nn.ModuleList([sublayer]) for sublayer in decoder.sublayers],
        lambda: setattr(decoder, "activation_checkpointing", True),
        lambda: setattr(decoder, "drop_mechanism", "detach"),
        stream,
    )


def foreign(config: ModelConfig = CONFIG, dropout: float = 0.0, **options: Any) -> Subject:
    torch.manual_seed(0)
    model = transformers_model(config).train()
    blocks = residual_blocks(model)
    with_dropout([branch[-1] for block in blocks for branch in block.branches], dropout)
    method = transform(**options)
    method.apply(model, TransformContext(config, Topology()))
    (switch,) = method._foreign
    stream: list[Tensor] = []

    def run(mask: Mask | None) -> Tensor:
        stream.clear()
        switch.use(mask)
        logits: Tensor = model(input_ids=tokens(), use_cache=False).logits.float()
        return logits

    # The stream is the block's input, at the norm of its first branch; the last one goes into the final norm.
    blocks[0].branches[0][0].register_forward_pre_hook(lambda module, args: stream.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda module, args: stream.append(args[0]))

    def detach() -> None:
        nonlocal switch
        switch.remove()
        switch = SwitchedBranches(model, "detach")

    return Subject(
        model,
        run,
        [nn.ModuleList(branch) for block in blocks for branch in block.branches],
        lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}),
        detach,
        stream,
    )


class Dropped(nn.Module):
    """A sublayer whose output goes through dropout, as a foreign model may have it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def hook(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.hook(output[0]), *output[1:])
        return nn.functional.dropout(output, self.rate)


def with_dropout(modules: Any, rate: float) -> None:
    """Inside the branch: before the sublayer's own forward returns."""
    if rate == 0.0:
        return
    for module in modules:
        forward, drop = module.forward, Dropped(rate)
        module.forward = lambda *args, forward=forward, drop=drop, **kwargs: drop.hook(forward(*args, **kwargs))


KINDS = {"ours": ours, "transformers": foreign}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[..., Subject]:
    return KINDS[request.param]


def assert_equal_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], gradient), name  # type: ignore[arg-type]


# T1


def test_a_rate_of_zero_is_the_run_without_dropbp(kind: Callable[..., Subject]) -> None:
    def course(mask: Mask | None) -> tuple[list[Tensor], list[Tensor]]:
        subject = kind()
        optimizer = torch.optim.AdamW(subject.module.parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            value = loss(subject.run(mask))
            value.backward()
            losses.append(value.detach())
            optimizer.step()
            optimizer.zero_grad()
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        return losses, [*(p.detach() for p in subject.module.parameters()), *state]

    nothing = transform(rate=0.0).context(0, 0, ForwardMeta()).dropbp_mask
    assert nothing == (False,) * 6
    (losses, state), (expected_losses, expected) = course(nothing), course(None)
    assert torch.equal(torch.stack(losses), torch.stack(expected_losses))
    assert len(state) == len(expected) > 30
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


# T2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mask", MASKS)
def test_no_mask_changes_the_forward_or_the_random_state(
    kind: Callable[..., Subject], mask: Mask, dropout: float
) -> None:
    subject = kind(dropout=dropout)

    def forward(mask: Mask | None) -> tuple[Tensor, Tensor, Any, Any]:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        logits = subject.run(mask)
        loss(logits).backward()
        return logits.detach(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    found, expected = forward(mask), forward(None)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2:] == expected[2:]
    if dropout:
        torch.manual_seed(6)
        assert not torch.equal(subject.run(mask), found[0])


# T3


@pytest.mark.parametrize("mask", MASKS)
def test_both_mechanisms_with_and_without_checkpointing_give_the_same_gradients(
    kind: Callable[..., Subject], mask: Mask
) -> None:
    expected = kind().gradients(mask)
    for detach in (False, True):
        for checkpointing in (False, True):
            subject = kind()
            if detach:
                subject.use_detach()
            if checkpointing:
                subject.checkpointing()
            assert_equal_gradients(subject.gradients(mask), expected)


# T4


def constant_branches(subject: Subject, mask: Mask) -> dict[str, Tensor | None]:
    """Gradients with the outputs of dropped branches computed beforehand and put in as constants.

    Another mechanism than the one under test: the branch's last module does not run at all in the second forward.
    """
    outputs: dict[int, Any] = {}
    lasts = [branch[-1] for branch in subject.branches]
    hooks = [
        last.register_forward_hook(lambda module, args, output, i=i: outputs.__setitem__(i, output))
        for i, last in enumerate(lasts)
    ]
    with torch.no_grad():
        subject.run(None)
    for hook in hooks:
        hook.remove()
    restore = []
    for i, (last, bit) in enumerate(zip(lasts, mask, strict=True)):
        if bit:
            restore.append((last, last.__dict__.get("forward")))
            last.forward = lambda *args, i=i, **kwargs: outputs[i]
    found = subject.gradients(None)
    for last, forward in restore:
        if forward is None:
            del last.forward
        else:
            last.forward = forward
    return found


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_are_those_of_a_model_whose_dropped_branches_are_constants(
    kind: Callable[..., Subject], mask: Mask
) -> None:
    subject = kind()
    expected = constant_branches(subject, mask)
    found = subject.gradients(mask)
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        elif found[name] is None:
            assert not gradient.any(), name
        else:
            assert torch.equal(found[name], gradient), name  # type: ignore[arg-type]
    full = subject.gradients(None)
    assert any(not torch.equal(full[name], g) for name, g in found.items() if g is not None)  # type: ignore[arg-type]


# T5


def test_with_everything_dropped_the_gradient_passes_unchanged(kind: Callable[..., Subject]) -> None:
    subject = kind()
    logits = subject.run(ALL)
    first, last = subject.stream[0], subject.stream[-1]
    at_first, at_last = torch.autograd.grad(loss(logits), [first, last], retain_graph=True)
    assert torch.equal(at_first, at_last)
    assert at_first.abs().max() > 0
    found = subject.gradients(ALL)
    trained = {name for name, gradient in found.items() if gradient is not None}
    assert trained == set(found) - subject.dropped_names(ALL)
    assert len(trained) == 3  # embedding, final norm, head


# T6


@pytest.mark.parametrize("mask", MASKS)
def test_parameters_of_dropped_sublayers_have_no_gradient_and_all_others_have_one(
    kind: Callable[..., Subject], mask: Mask
) -> None:
    subject = kind()
    found = subject.gradients(mask)
    assert {name for name, gradient in found.items() if gradient is None} == subject.dropped_names(mask)
    assert len(subject.dropped_names(mask)) >= 2 * sum(mask)


# T7


def counted(subject: Subject, mask: Mask | None) -> tuple[int, int]:
    """(operations of the forward, of the backward) of matrix products, per token, by torch's own counter."""
    subject.module.zero_grad(set_to_none=True)
    # The counter does not know the CPU's fused attention; the plain one computes masked pairs too.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            value = loss(subject.run(mask))
        with FlopCounterMode(display=False) as backward:
            value.backward()
    per_token = ROWS * SEQ
    assert forward.get_total_flops() % per_token == backward.get_total_flops() % per_token == 0
    return forward.get_total_flops() // per_token, backward.get_total_flops() // per_token


# transformers checkpoints whole blocks, which the next test counts.
@pytest.mark.parametrize(
    ("build", "checkpointing"), [(ours, False), (ours, True), (foreign, False)], ids=["ours", "ours-again", "foreign"]
)
def test_the_operations_saved_are_those_predicted_to_the_last_one(
    build: Callable[..., Subject], checkpointing: bool
) -> None:
    subject = build()
    if checkpointing:
        subject.checkpointing()
    costs = StepCosts(CONFIG, SEQ, checkpointing=checkpointing, attended=1.0)
    whole = counted(subject, None)
    assert whole == (costs.forward, costs.backward_whole)
    for mask in (*MASKS, ALL):
        forward, backward = counted(subject, mask)
        assert forward == whole[0]
        assert whole[1] - backward == costs.backward_whole - costs.backward(mask) > 0


def test_a_checkpointed_block_with_both_branches_dropped_is_not_computed_again() -> None:
    subject = foreign()
    subject.checkpointing()
    block = (False, False, True, True, False, False)
    costs = StepCosts(CONFIG, SEQ, attended=1.0)
    whole, dropped = counted(subject, None), counted(subject, block)
    plain = costs.backward_whole - costs.backward(block)
    again = whole[1] - dropped[1] - plain
    # The whole block is computed again but for its last product, where recomputation stops.
    assert again == costs.sublayers[2].forward + costs.sublayers[3].recompute
    assert counted(subject, None) == whole


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), LoRAConfig().targets], ids="+".join)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_under_low_rank_updates_are_predicted_too(targets: tuple[str, ...], checkpointing: bool) -> None:
    adapter = LoRAConfig(rank=4, targets=targets)
    subject = ours()
    LoRA(adapter, 0).apply(subject.module, TransformContext(CONFIG, Topology()))
    if checkpointing:
        subject.checkpointing()
    costs = StepCosts(CONFIG, SEQ, Trained.updates(adapter, CONFIG), checkpointing, attended=1.0)
    for mask in (None, *MASKS):
        expected = costs.backward(mask or (False,) * 6)
        if expected == 0:
            continue
        assert counted(subject, mask) == (costs.forward, expected), mask


def stored_values(subject: Subject, mask: Mask | None) -> int:
    """Values that autograd keeps of the sublayers, each storage once, weights apart."""
    known = {p.untyped_storage().data_ptr() for p in subject.module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known and inside[0]:
            kept[pointer] = tensor
        return tensor

    inside = [False]
    hooks = []
    for branch in subject.branches:
        for module in branch:
            hooks.append(module.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)))
            hooks.append(module.register_forward_hook(lambda *_: inside.__setitem__(0, False)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = subject.run(mask)
    for hook in hooks:
        hook.remove()
    del logits
    return sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept.values())


def test_stored_activations_are_those_counted() -> None:
    config = tiny_config(num_layers=3, hidden_size=128, intermediate_size=320)
    subject = ours(config)
    costs = StepCosts(config, SEQ)
    rotary = 2 * SEQ * config.head_size
    for mask in (None, *MASKS):
        expected = ROWS * SEQ * costs.stored(mask or (False,) * 6)
        found = stored_values(subject, mask)
        assert expected <= found <= expected + rotary, mask
    assert stored_values(subject, ALL) == 0


def test_dropping_stores_no_more_than_the_kept_share() -> None:
    config = tiny_config(num_layers=8)
    costs = StepCosts(config, 64)
    for rate in (0.5, 0.75, 0.875):
        schedule = DropBP(DropBPConfig(rate=rate), config, steps=1, seed=0).schedule
        saving = costs.saving([schedule.mask(step, 0) for step in range(400)])
        assert saving.rate == rate
        assert saving.weighted_rate == pytest.approx(rate, abs=0.02)
        assert saving.stored == pytest.approx(1 - rate, abs=0.02)


# T8


@pytest.mark.parametrize("regions", [1, 2])
@pytest.mark.parametrize("detach", [False, True], ids=["no_grad", "detach"])
def test_a_sublayer_dropped_first_and_kept_second_gets_its_gradient_under_autocast(
    kind: Callable[..., Subject], regions: int, detach: bool
) -> None:
    """torch's cache of cast weights once kept a weight cast without history (pytorch issues 65766, 158232)."""
    subject = kind()
    if detach:
        subject.use_detach()
    first: Mask = (False, False, True, True, False, False)
    names = subject.dropped_names(first)

    def step(masks: list[Mask | None], regions: int) -> dict[str, Tensor | None]:
        subject.module.zero_grad(set_to_none=True)
        if regions == 1:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = [loss(subject.run(mask)) for mask in masks]
            for value in losses:
                value.backward()
        else:
            for mask in masks:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    value = loss(subject.run(mask))
                value.backward()
        return {name: p.grad for name, p in subject.module.named_parameters()}

    alone = step([None], 2)
    expected = {name: gradient.clone() for name, gradient in alone.items() if name in names and gradient is not None}
    found = step([first, None], regions)
    assert expected.keys() == names
    for name, gradient in expected.items():
        # Dropped in the first micro-batch: all of it comes from the second.
        assert found[name] is not None, name
        assert torch.equal(found[name], gradient), name  # type: ignore[arg-type]


# The rest of the seam to foreign models


def test_an_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"Linear \(model_type None\) has no residual sublayers .* known: llama"):
        transform().apply(nn.Linear(2, 2), TransformContext(CONFIG, Topology()))


def test_a_hyperclovax_of_transformers_is_known_with_its_second_norms() -> None:
    config = tiny_config("hyperclovax", num_layers=3)
    subject = foreign(config)
    assert all(len(branch) == 3 for branch in subject.branches)
    found = subject.gradients(MASKS[0])
    assert {name for name, gradient in found.items() if gradient is None} == subject.dropped_names(MASKS[0])


def test_switches_leave_a_model_as_it_was() -> None:
    subject = foreign()
    model, bare = subject.module, transformers_model(CONFIG)
    bare.load_state_dict(model.state_dict())
    before = bare(input_ids=tokens()).logits
    with switched(bare, MASKS[0]) as branches:
        assert branches.count == 6
        assert torch.equal(bare(input_ids=tokens()).logits, before)
        with pytest.raises(ConfigError, match="a mask of 2 sublayers, but the model has 6"):
            branches.use((True, False))
    assert not any("forward" in module.__dict__ for module in bare.modules())
    loss(bare(input_ids=tokens()).logits).backward()
    assert all(parameter.grad is not None for parameter in bare.parameters())


def test_evaluation_drops_nothing() -> None:
    decoder = tiny_decoder(CONFIG).eval()
    assert isinstance(decoder, Decoder)
    loss(decoder.output(decoder(tokens(), ForwardMeta())).logits()).backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
