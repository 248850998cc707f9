"""A binary-coded model behind the server: stated as such, and equal to its dequantized weights."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from hcx.compress import CompressPlan, compress_model
from hcx.model.convert import registration
from hcx.model.load import load_model
from hcx.serve.config import ServeConfig
from hcx.testing.serving import running_server
from hcx.testing.tiny import tiny_model_directory


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
def test_a_binary_coded_model_answers_as_transformers_does_and_states_its_bits(
    tmp_path: Path, architecture: str
) -> None:
    transformers = pytest.importorskip("transformers")
    source = tiny_model_directory(tmp_path / "full", architecture)
    directory = tmp_path / "coded"
    compress_model(source, directory, CompressPlan.model_validate({"default": {"bits": 3, "group_size": 32}}))
    loaded = load_model(directory, numerics="reference")
    text = "대한민국의 수도는"
    with running_server(loaded, ServeConfig(model_name="coded")) as (url, _):
        (model,) = httpx.get(f"{url}/v1/models").json()["data"]
        call = {"prompt": text, "temperature": 0, "max_tokens": 24}
        answer = httpx.post(f"{url}/v1/completions", json=call, timeout=60).json()["choices"][0]["text"]
    assert (model["bits"], model["quantization"], model["numerics"]) == (3, "bcq", "reference")
    assert model["kernels"]
    registration.register()
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert answer == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
