"""Logits and greedy text of random models against `transformers`, both directions of conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hcx.errors import CheckpointError
from hcx.model.convert.hf import config_from_hf, config_to_hf, export_hf
from hcx.model.load import iter_tensors, load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.tiny import decoder_tensors, tiny_config, tiny_decoder

transformers = pytest.importorskip("transformers")

# fp32 on one CPU: the same products in another order.
TOLERANCE = 1e-5

VARIANTS = {
    "llama": {},
    "llama-tied": {"tie_embeddings": True},
    "llama-all-heads": {"num_kv_heads": 4},
    "llama-head-dim": {"head_dim": 32, "rope_theta": 500000.0},
    "hyperclovax": {},
    "hyperclovax-tied": {"tie_embeddings": True},
    "hyperclovax-without-post-norm": {"use_post_norm": False},
    "hyperclovax-default-attention": {"attention_multiplier": None},
}


def _config(name: str):
    return tiny_config(name.split("-")[0], **VARIANTS[name])


def _tokens() -> torch.Tensor:
    return torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(1))


def _logits(decoder, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return decoder.output(decoder(tokens, ForwardMeta())).logits()


@pytest.mark.parametrize("name", VARIANTS)
def test_an_exported_model_gives_the_same_logits_in_transformers(name: str, tmp_path: Path) -> None:
    decoder = tiny_decoder(_config(name))
    export_hf(tmp_path, _config(name), decoder_tensors(decoder).items())
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = model(_tokens()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(_logits(decoder, _tokens()), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_saved_by_transformers_gives_the_same_logits_here(name: str, tmp_path: Path) -> None:
    values = config_to_hf(_config(name))
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = load_model(tmp_path)
    with torch.no_grad():
        expected = model(_tokens()).logits
    torch.testing.assert_close(_logits(loaded.decoder, _tokens()), expected, rtol=0, atol=TOLERANCE)


def test_conversion_there_and_back_keeps_every_byte(tmp_path: Path) -> None:
    config = tiny_config("hyperclovax", head_dim=16)
    tensors = decoder_tensors(tiny_decoder(config))
    export_hf(tmp_path, config, tensors.items(), max_shard_bytes=50_000)
    assert config_from_hf(json.loads((tmp_path / "config.json").read_text())) == config
    back = dict(iter_tensors(tmp_path))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("model_type", "mamba"),
    ],
)
def test_an_option_the_decoder_does_not_compute_is_refused(key: str, value: object) -> None:
    values = config_to_hf(tiny_config()) | {key: value}
    with pytest.raises(CheckpointError, match="not supported"):
        config_from_hf(values)


def test_a_missing_size_names_the_key() -> None:
    values = config_to_hf(tiny_config())
    del values["intermediate_size"]
    with pytest.raises(CheckpointError, match="intermediate_size is missing"):
        config_from_hf(values, "somewhere/config.json")


def test_damaged_or_foreign_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model directory"):
        load_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(tmp_path)
    config = tiny_config()
    export_hf(tmp_path, config, decoder_tensors(tiny_decoder(config)).items())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_model(tmp_path)
