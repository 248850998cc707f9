"""The decoder: pipeline splits, dropped branches, packed documents, chunked losses, low-rank updates."""

from __future__ import annotations

import pytest
import torch

from hcx.model.decoder import Decoder
from hcx.model.flops import matrix_parameters_per_layer, parameter_count, training_flops_per_token
from hcx.model.meta import ForwardMeta
from hcx.model.parts import logprobs
from hcx.model.parts.base import PlainParts
from hcx.model.parts.norm import rms_norm
from hcx.model.parts.sources import LoRASource
from hcx.model.rope import rotary_tables, rotate
from hcx.model.weights import InitWeights, load_weights
from hcx.testing.batches import packed_rows
from hcx.testing.tiny import tiny_config, tiny_decoder

TOLERANCE = 1e-5


def _tokens(rows: int = 2, seq: int = 12) -> torch.Tensor:
    return torch.randint(0, 384, (rows, seq), generator=torch.Generator().manual_seed(2))


def _logits(decoder: Decoder, tokens: torch.Tensor, meta: ForwardMeta | None = None) -> torch.Tensor:
    with torch.no_grad():
        return decoder.output(decoder(tokens, meta or ForwardMeta())).logits()


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
@pytest.mark.parametrize("tied", [False, True])
def test_two_stages_in_a_row_compute_what_one_decoder_does(architecture: str, tied: bool) -> None:
    config = tiny_config(architecture, tie_embeddings=tied)
    whole = Decoder(config, PlainParts())
    first = Decoder(config, PlainParts(), layers=range(1), post=False)
    last = Decoder(config, PlainParts(), layers=range(1, 2), pre=False)
    for decoder in (whole, first, last):
        load_weights(decoder, decoder.parameter_map(), InitWeights(config, 4))
    with torch.no_grad():
        hidden = last(first(_tokens(), ForwardMeta()), ForwardMeta())
        assert torch.equal(last.output(hidden).logits(), _logits(whole, _tokens()))
    names = {block.name for d in (first, last) for blocks in d.parameter_map().values() for block in blocks}
    assert names == {block.name for blocks in whole.parameter_map().values() for block in blocks}


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
def test_a_packed_row_equals_its_documents_alone(architecture: str) -> None:
    decoder = tiny_decoder(tiny_config(architecture))
    batch = packed_rows(2, 24, 384)
    assert batch.document_ids is not None
    packed = _logits(decoder, batch.tokens, ForwardMeta(positions=batch.positions, document_ids=batch.document_ids))
    for row in range(2):
        for document in batch.document_ids[row].unique():
            where = batch.document_ids[row] == document
            alone = _logits(decoder, batch.tokens[row][where][None])
            torch.testing.assert_close(packed[row][where], alone[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dropped_branch_stores_no_activation_and_is_not_computed_again(checkpointing: bool) -> None:
    decoder = tiny_decoder(tiny_config())
    decoder.activation_checkpointing = checkpointing
    calls: list[int] = []
    for sublayer in decoder.sublayers:
        sublayer.register_forward_pre_hook(lambda module, *_: calls.append(module.index))
    saved: list[int] = []

    def stored_bytes(mask: tuple[bool, ...] | None) -> int:
        saved.clear()
        calls.clear()
        # Values saved by autograd, parameters apart: what a dropped branch must not add to.
        known = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                saved.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = decoder(_tokens(), ForwardMeta(dropbp_mask=mask))
        total = sum(saved)
        hidden.sum().backward()
        decoder.zero_grad()
        return total

    everything = stored_bytes(None)
    computed = len(calls)
    assert computed == (8 if checkpointing else 4)
    most_dropped = stored_bytes((True, True, True, False))
    assert most_dropped < 0.6 * everything
    assert calls.count(0) == calls.count(1) == calls.count(2) == 1


def test_chunked_log_probabilities_equal_log_softmax_with_and_without_kept_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (37,), generator=generator)
    factors = torch.rand(37, generator=generator)
    expected = (0.5 * hidden @ weight.t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    wanted = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    for keep_bytes in (1 << 30, 0):
        monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * 50 * 7)  # seven tokens per chunk
        monkeypatch.setattr(logprobs, "KEEP_BYTES", keep_bytes)
        found = logprobs.chunked_token_logprobs(hidden, weight, labels, 0.5)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        gradients = torch.autograd.grad((found * factors).sum(), (hidden, weight))
        for one, two in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_equals_torch_in_value_and_gradient(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 32, generator=generator).to(dtype).requires_grad_()
    weight = (1 + 0.2 * torch.randn(32, generator=generator)).to(dtype).requires_grad_()
    factors = torch.randn(5, 3, 32, generator=generator)
    found, expected = rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (32,), weight, 1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad((found.float() * factors).sum(), (x, weight))
    theirs = torch.autograd.grad((expected.float() * factors).sum(), (x, weight))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def test_the_rotation_passes_a_numerical_gradient_check() -> None:
    config = tiny_config()
    x = torch.randn(3, 2, 2, 16, dtype=torch.float64, requires_grad=True)
    tables = rotary_tables(config, torch.tensor([[0, 1, 2], [0, 0, 1]]), 3, x)
    assert torch.autograd.gradcheck(lambda value: rotate(value, tables), (x,))
    assert torch.equal(rotate(x, tables)[0], x[0])  # position 0 is not turned


def test_low_rank_updates_equal_peft() -> None:
    peft = pytest.importorskip("peft")
    linear = torch.nn.Linear(24, 40, bias=False)
    model = torch.nn.Sequential()
    model.add_module("proj", linear)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model.proj

    from hcx.model.parts.linear import LinearPart

    part = LinearPart(PlainParts(), {"proj": (40, 24)}, "column")
    with torch.no_grad():
        part.source.weight.copy_(linear.weight)  # type: ignore[union-attr]
    source = LoRASource(part.source, part.blocks, rank=4, alpha=6)
    with torch.no_grad():
        source.lora_a["proj"].copy_(layer.lora_A["default"].weight)
        source.lora_b["proj"].copy_(layer.lora_B["default"].weight)
    part.replace_source(source)
    x = torch.randn(5, 2, 24)
    torch.testing.assert_close(part(x), wrapped(x), rtol=0, atol=TOLERANCE)
    assert {block.name for blocks in part.parameter_map().values() for block in blocks} == {
        "proj.weight",
        "proj.lora_A.weight",
        "proj.lora_B.weight",
    }


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
@pytest.mark.parametrize("tied", [False, True])
def test_counted_parameters_are_those_of_the_decoder(architecture: str, tied: bool) -> None:
    config = tiny_config(architecture, tie_embeddings=tied)
    decoder = tiny_decoder(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in decoder.parameters())


def test_counted_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config()
    decoder = tiny_decoder(config)
    tokens = _tokens(2, 32)
    # Only products are counted, so attention must be made of products here.
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder.output(decoder(tokens, ForwardMeta())).logits()
    # torch counts full attention where the causal half is computed: take that part out on both sides.
    attention = 2 * 2 * 32 * config.num_heads * config.head_size * config.num_layers
    matrices = counter.get_total_flops() / tokens.numel() - attention
    expected = training_flops_per_token(config, 32) / 3 - attention / 2
    assert matrices == pytest.approx(expected, rel=0.01)
    assert matrix_parameters_per_layer(config) * 2 * 2 < matrices
