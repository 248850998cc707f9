"""LoRA against the peft library on the same weights: training, files in both directions, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hcx.data.batch import MicroBatch
from hcx.engine.base import StepBatch
from hcx.engine.config import TorchEngineConfig
from hcx.engine.torch_engine import TorchEngine
from hcx.errors import CheckpointError, ConfigError
from hcx.model.adapters import Adapter, LoRA, LoRAConfig, target_stems
from hcx.model.config import ModelConfig
from hcx.model.convert.hf import export_hf
from hcx.model.convert.peft import read_adapter, write_adapter
from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.model.weights import TensorWeights
from hcx.optim import OptimConfig
from hcx.recipe.convert import convert_model
from hcx.testing.tiny import decoder_tensors, tiny_config, tiny_decoder
from hcx.train import NextToken

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

STEPS = 20
TOLERANCE = 1e-5
"""fp32 both times; sums in another order grow over twenty steps of an optimizer."""
LEARNING_RATE = 1e-2
EPS = 1e-3
"""Large: with 1e-8, gradients at rounding level become updates of full size."""
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    "one of a fused part": LoRAConfig(rank=4, alpha=8.0, targets=("v_proj",)),
    "two of a fused part and a row-parallel one": LoRAConfig(rank=3, alpha=7.0, targets=("q_proj", "v_proj", "o_proj")),
    "every linear": LoRAConfig(rank=8, alpha=16.0, targets=ALL),
    "one block's": LoRAConfig(rank=2, alpha=2.0, targets=("layers.1.mlp.down_proj", "layers.0.self_attn.k_proj")),
}


def base(directory: Path, architecture: str) -> ModelConfig:
    config = tiny_config(architecture)
    directory.mkdir(parents=True)
    export_hf(directory, config, decoder_tensors(tiny_decoder(config, seed=5)).items())
    return config


def theirs(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(str(directory), local_files_only=True).float()


def engine_with_lora(directory: Path, lora: LoRAConfig, initial: Adapter | None = None) -> TorchEngine:
    loaded = load_model(directory)
    tensors = decoder_tensors(loaded.decoder)
    return TorchEngine(
        engine_config=TorchEngineConfig(clip_grad_norm=0.0),
        model_config=loaded.config,
        optim_config=OptimConfig(kind="adamw", lr=LEARNING_RATE, eps=EPS, weight_decay=0.0),
        transforms=[LoRA(lora, seed=1, initial=initial)],
        weights=TensorWeights(tensors.__getitem__, str(directory)),
    )


def batch(config: ModelConfig, step: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(config.vocab_size, (3, 13), generator=generator)
    weights = torch.rand(3, 12, generator=generator)
    positions = torch.arange(12).expand(3, -1).contiguous()
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, positions)


def updates(engine: TorchEngine) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in engine.export_state() if ".lora_" in name}


def peft_updates(model: Any) -> dict[str, Tensor]:
    found = peft.get_peft_model_state_dict(model)
    return {name.removeprefix("base_model.model."): tensor.detach() for name, tensor in found.items()}


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_peft(tmp_path: Path, architecture: str, case: str) -> None:
    lora = CASES[case]
    config = base(tmp_path / "base", architecture)
    engine = engine_with_lora(tmp_path / "base", lora)
    start = Adapter(lora.rank, lora.alpha, lora.targets, updates(engine), tmp_path)
    (tmp_path / "start").mkdir()
    write_adapter(tmp_path / "start", start, str(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), str(tmp_path / "start"), is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trained) == sum(tensor.numel() for tensor in start.tensors.values())
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        micro = batch(config, step)
        stats = engine.train_step(StepBatch(step, [micro]), NextToken(), 1.0)
        logprobs = model(input_ids=micro.tokens).logits.log_softmax(-1)
        picked = logprobs.gather(-1, micro.labels[..., None])[..., 0]
        loss = -(picked * micro.weights).sum() / micro.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(stats.loss)
        assert stats.loss == pytest.approx(float(loss.detach()), abs=TOLERANCE)
    ours, peers = updates(engine), peft_updates(model)
    assert ours.keys() == peers.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, peers[name], rtol=0, atol=TOLERANCE)
    # Something was learned, or equality would say little.
    assert max(float((ours[name] - start.tensors[name]).abs().max()) for name in ours) > 0.01


def random_adapter(directory: Path, lora: LoRAConfig) -> Adapter:
    """Updates with B away from zero."""
    found = updates(engine_with_lora(directory, lora))
    generator = torch.Generator().manual_seed(3)
    tensors = {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in found.items()}
    return Adapter(lora.rank, lora.alpha, lora.targets, tensors, directory)


def logits(directory: Path, adapter: Path | None = None) -> Tensor:
    loaded = load_model(directory, adapter=adapter)
    tokens = torch.arange(7, 27)[None]
    with torch.no_grad():
        return loaded.decoder.output(loaded.decoder(tokens, ForwardMeta())).logits()


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
def test_peft_computes_our_adapter_and_its_merge_as_we_do(tmp_path: Path, architecture: str) -> None:
    base(tmp_path / "base", architecture)
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", random_adapter(tmp_path / "base", CASES["every linear"]), str(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), str(tmp_path / "ours"))
    tokens = torch.arange(7, 27)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        merged = model.merge_and_unload()(input_ids=tokens).logits
    found = logits(tmp_path / "base", tmp_path / "ours")
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert float((found - logits(tmp_path / "base")).abs().max()) > 0.1
    convert_model(tmp_path / "base", tmp_path / "merged", torch.float32, adapter=tmp_path / "ours")
    torch.testing.assert_close(logits(tmp_path / "merged"), merged, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tmp_path / "merged")(input_ids=tokens).logits, merged, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_saved_computes_here_as_there_and_trains_on(tmp_path: Path, rslora: bool) -> None:
    base(tmp_path / "base", "llama")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_rslora=rslora, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(theirs(tmp_path / "base"), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
        expected = model(input_ids=torch.arange(7, 27)[None]).logits
    model.save_pretrained(str(tmp_path / "peft"))
    torch.testing.assert_close(logits(tmp_path / "base", tmp_path / "peft"), expected, rtol=0, atol=TOLERANCE)
    adapter = read_adapter(tmp_path / "peft")
    lora = LoRAConfig(rank=4, alpha=adapter.alpha, targets=adapter.targets)
    engine = engine_with_lora(tmp_path / "base", lora, initial=adapter)
    assert updates(engine).keys() == peft_updates(model).keys()
    for name, tensor in updates(engine).items():
        assert torch.equal(tensor, peft_updates(model)[name])
    with pytest.raises(ConfigError, match=r"set adapter\.rank and adapter\.alpha"):
        LoRA(LoRAConfig(rank=8), seed=0, initial=adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 5}, "but r = 5"),
        ({"r": None}, "must be numbers"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base(tmp_path / "base", "llama")
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", random_adapter(tmp_path / "base", LoRAConfig(targets=("q_proj",))), "base")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path / "adapter")


def test_damaged_missing_or_foreign_adapters_are_named(tmp_path: Path) -> None:
    base(tmp_path / "base", "llama")
    with pytest.raises(CheckpointError, match="no such adapter directory"):
        load_model(tmp_path / "base", adapter=tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        load_model(tmp_path / "base", adapter=tmp_path)
    directory = tmp_path / "adapter"
    directory.mkdir()
    adapter = random_adapter(tmp_path / "base", LoRAConfig(targets=("q_proj",)))
    write_adapter(directory, adapter, "base")
    smaller = tiny_config("llama", hidden_size=32, num_layers=1)
    (tmp_path / "smaller").mkdir()
    export_hf(tmp_path / "smaller", smaller, decoder_tensors(tiny_decoder(smaller)).items())
    with pytest.raises(CheckpointError, match="which this model does not have"):
        load_model(tmp_path / "smaller", adapter=directory)
    with pytest.raises(CheckpointError, match="give the model that the adapter was made for"):
        convert_model(tmp_path / "smaller", tmp_path / "out", torch.float32, adapter=directory)
    weights = directory / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_adapter(directory)
    weights.unlink()
    (directory / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="never loaded"):
        read_adapter(directory)


def test_a_target_that_names_no_linear_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        target_stems(("q_prj",), tiny_config())
    assert len(target_stems(("q_proj", "layers.0.mlp.up_proj"), tiny_config())) == 3
