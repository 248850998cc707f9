"""The native decoding step beside the steps in torch: the same logits and tokens, in every layout that it serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hcx.compress import CompressPlan, compress_model
from hcx.errors import KernelError
from hcx.generate import ContiguousKVCache, EagerSteps, Generator, SamplingParams
from hcx.generate.native_step import NativeSteps, best_steps, why_not_native
from hcx.kernels import native
from hcx.model.load import LoadedModel, load_model
from hcx.testing.tiny import tiny_model_directory

pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")

SHAPES = {
    "llama": {},
    # Peri-LN and all multipliers.
    "hyperclovax": {"architecture": "hyperclovax"},
    # No size is a multiple of the lanes, and q, k and v have different heights.
    "odd": {"hidden_size": 72, "num_heads": 6, "num_kv_heads": 2, "head_dim": 12, "intermediate_size": 100},
    "wide heads": {"hidden_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
}


@pytest.fixture(scope="module", params=SHAPES)
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("native")
    settings = {"initializer_range": 0.1, **SHAPES[request.param]}
    tiny_model_directory(root / "full", with_tokenizer=False, **settings)
    plan = CompressPlan.model_validate({"default": {"bits": 3, "group_size": 32, "offset": True}})
    compress_model(root / "full", root / "coded", plan)
    return root / "coded"


def _decoded(loaded: LoadedModel, steps: EagerSteps, count: int = 20) -> torch.Tensor:
    """Logits of `count` tokens for three rows of different lengths, the same tokens whatever the steps."""
    generator = torch.Generator().manual_seed(2)
    lengths = [7, 40, 1]
    cache = ContiguousKVCache(loaded.config, rows=4, max_seq=90, dtype=torch.float32)
    # Written before: what a row must not see.
    cache.keys.fill_(3.0)
    cache.values.fill_(-5.0)
    for row, length in enumerate(lengths):
        prompt = torch.randint(0, 384, (1, length), generator=generator)
        EagerSteps(loaded.decoder).prefill(prompt, torch.arange(length)[None], cache.view(row + 1, 1, length))
    found = []
    for step in range(count):
        tokens = torch.randint(0, 384, (3,), generator=generator)
        positions = torch.tensor(lengths) + step
        found.append(steps.decode_step(tokens, positions, cache.view(1, 3, int(positions.max()) + 1)))
    return torch.stack(found)


@pytest.mark.parametrize(("numerics", "tolerance"), [("exact", 2e-3), ("fast", 0.1)])
def test_logits_are_those_of_the_steps_in_torch(coded: Path, numerics: str, tolerance: float) -> None:
    """Activations are rounded to tables of 15 or 8 bits: a last bit before may move an entry by one step."""
    loaded = load_model(coded, numerics=numerics)
    steps = best_steps(loaded.decoder)
    assert isinstance(steps, NativeSteps)
    expected, found = _decoded(loaded, EagerSteps(loaded.decoder)), _decoded(loaded, steps)
    scale = float(expected.std())
    assert float((found - expected).abs().max()) <= tolerance * scale
    assert float((found - expected).square().mean().sqrt()) <= tolerance / 8 * scale


def test_a_row_has_the_bits_that_it_has_alone_and_threads_change_nothing(coded: Path) -> None:
    loaded = load_model(coded, numerics="exact")
    steps = NativeSteps(loaded.decoder)
    whole = _decoded(loaded, steps, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(_decoded(loaded, steps, 4), whole)
    finally:
        torch.set_num_threads(before)
    cache = ContiguousKVCache(loaded.config, rows=2, max_seq=90, dtype=torch.float32)
    tokens, positions = torch.tensor([5, 300]), torch.tensor([0, 0])
    together = steps.decode_step(tokens, positions, cache.view(0, 2, 1))
    alone = steps.decode_step(tokens[1:], positions[1:], cache.view(1, 1, 1))
    torch.testing.assert_close(together[1:], alone, rtol=1e-6, atol=1e-6)


def test_every_instruction_set_gives_the_same_bits(coded: Path) -> None:
    loaded = load_model(coded, numerics="exact")
    inner = NativeSteps(loaded.decoder)
    decoder, (cosines, sines) = inner._native, inner._rotary(50)
    generator = torch.Generator().manual_seed(3)
    keys, values, hidden = (
        torch.randn(shape, generator=generator)
        for shape in (
            (loaded.config.num_layers, 2, 50, loaded.config.kv_heads, loaded.config.head_size),
            (loaded.config.num_layers, 2, 50, loaded.config.kv_heads, loaded.config.head_size),
            (2, loaded.config.hidden_size),
        )
    )
    found = {}
    for isa in ("portable", "avx2", "avx512"):
        state = [keys.clone(), values.clone()]
        result = hidden.clone()
        decoder.step(result, torch.tensor([49, 3]), *state, cosines, sines, isa=isa)
        found[isa] = [result, *state]
    for isa in ("avx2", "avx512"):
        for left, right in zip(found["portable"], found[isa], strict=True):
            assert torch.equal(left, right)


def test_generation_takes_it_and_gives_the_same_tokens(coded: Path) -> None:
    loaded = load_model(coded, numerics="exact")
    prompts = [[5, 6, 7], [300], list(range(40))]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    native_answers = Generator(loaded, max_batch=2).generate(prompts, params)
    torch_answers = Generator(loaded, max_batch=2, steps=EagerSteps(loaded.decoder)).generate(prompts, params)
    assert [one.token_ids for one in native_answers] == [one.token_ids for one in torch_answers]


def test_other_models_and_tasks_are_served_in_torch(tmp_path: Path, coded: Path) -> None:
    assert "fp32 on the CPU" in (why_not_native(load_model(coded, dtype=torch.bfloat16).decoder) or "")
    assert "tables" in (why_not_native(load_model(coded, numerics="reference").decoder) or "")
    tiny_model_directory(tmp_path / "full", with_tokenizer=False)
    dense = load_model(tmp_path / "full").decoder
    assert "not binary-coded" in (why_not_native(dense) or "")
    assert type(best_steps(dense)) is EagerSteps
    plan = {"default": {"bits": 3, "group_size": 32}, "rules": ({"pattern": "model.layers.0.*", "keep": True},)}
    compress_model(tmp_path / "full", tmp_path / "half", CompressPlan.model_validate(plan))
    assert "not binary-coded" in (why_not_native(load_model(tmp_path / "half", numerics="fast").decoder) or "")
    # Tasks.
    loaded = load_model(coded, numerics="exact")
    logits = []
    for one in (NativeSteps(loaded.decoder), EagerSteps(loaded.decoder)):
        cache = ContiguousKVCache(loaded.config, rows=1, max_seq=8, dtype=torch.float32)
        tokens, positions = torch.tensor([5]), torch.tensor([0])
        logits.append(one.decode_step(tokens, positions, cache.view(0, 1, 1), torch.tensor([0])))
    assert torch.equal(*logits)


def test_positions_and_layouts_out_of_range_are_refused(coded: Path) -> None:
    loaded = load_model(coded, numerics="exact")
    steps = NativeSteps(loaded.decoder)
    cache = ContiguousKVCache(loaded.config, rows=1, max_seq=8, dtype=torch.float32)
    for position in (9, -1):
        with pytest.raises(KernelError, match="out of range"):
            steps.decode_step(torch.tensor([5]), torch.tensor([position]), cache.view(0, 1, 1))
    cosines, sines = steps._rotary(8)
    hidden, where = torch.zeros(1, loaded.config.hidden_size), torch.tensor([7])
    with pytest.raises(KernelError, match="contiguous heads"):
        steps._native.step(hidden, where, cache.keys.transpose(3, 4), cache.values, cosines, sines)
    with pytest.raises(KernelError, match="contiguous heads"):
        steps._native.step(hidden, where, cache.keys[:1], cache.values[:1], cosines, sines)
    with pytest.raises(KernelError, match="out of range"):  # beyond the tables
        steps._native.step(hidden, where, cache.keys, cache.values, cosines[:7], sines[:7])
    with pytest.raises(KernelError, match="expected torch"):
        steps._native.step(hidden.double(), where, cache.keys, cache.values, cosines, sines)
