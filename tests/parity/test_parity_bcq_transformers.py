"""A binary-coded directory in transformers: the same logits with hcx registered, a failure without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hcx.compress import CompressPlan, ModulePlan, PlanRule, compress_model
from hcx.errors import CheckpointError
from hcx.model.convert import registration
from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.tiny import tiny_model_directory

# Dequantized weights are equal; fp32 products in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["llama", "hyperclovax"])
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    source = tiny_model_directory(root / "full", request.param, with_tokenizer=False)
    plan = CompressPlan(
        default=ModulePlan(bits=3, group_size=40, offset=True),
        # One stem of a fused matrix kept, another with other bits: the loader must split the fused part; one nested.
        rules=(
            PlanRule(pattern="*.layers.0.*.k_proj", keep=True),
            PlanRule(pattern="*.up_proj", bits=2),
            PlanRule(pattern="*.o_proj", widths=(2, 3)),
        ),
    )
    compress_model(source, root / "bcq", plan)
    return root / "bcq"


def _tokens() -> torch.Tensor:
    return torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(1))


def test_transformers_with_hcx_registered_gives_the_same_logits(compressed: Path) -> None:
    transformers = pytest.importorskip("transformers")
    registration.register()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        compressed, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    decoder = load_model(compressed).decoder
    with torch.no_grad():
        expected = decoder.output(decoder(_tokens(), ForwardMeta())).logits()
        found = model(_tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
def test_coded_embeddings_outputs_and_several_files_give_the_same_logits(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    registration.register()
    source = tiny_model_directory(tmp_path / "full", with_tokenizer=False, tie_embeddings=tied)
    settings = ModulePlan(bits=4, group_size=24, offset=True, scale_dtype="bf16")
    plan = CompressPlan(default=settings, embedding=settings, output=None if tied else settings)
    compress_model(source, tmp_path / "bcq", plan, max_shard_bytes=30_000)
    assert len(list((tmp_path / "bcq").glob("bcq-*-of-*.safetensors"))) > 1
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bcq", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    decoder = load_model(tmp_path / "bcq").decoder
    with torch.no_grad():
        expected = decoder.output(decoder(_tokens(), ForwardMeta())).logits()
        found = model(_tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) if tied else "planes" in dir(model.lm_head)


def test_changing_the_type_of_a_loaded_model_leaves_its_codes_alone(compressed: Path) -> None:
    transformers = pytest.importorskip("transformers")
    registration.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16)
    linear = model.model.layers[1].self_attn.q_proj
    assert (linear.scales.dtype, linear.offset.dtype) == (torch.float16, torch.float32)
    weight = linear.packed().dequantize()
    model.to(torch.float32)
    model.to(torch.bfloat16)
    assert torch.equal(linear.packed().dequantize(), weight)
    assert model(_tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stated: stated.update(version=2), "version = 2; this hcx reads 1"),
        (lambda stated: stated["modules"].update({"model.layers.7.mlp.up_proj": {}}), "no such module"),
        (
            lambda stated: stated["modules"]["model.layers.1.mlp.up_proj"].update(out_features=90),
            "not a bias-free linear layer of shape",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    compressed: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    transformers = pytest.importorskip("transformers")
    registration.register()
    shutil.copytree(compressed, tmp_path / "bcq")
    path = tmp_path / "bcq" / "config.json"
    values = json.loads(path.read_text())
    change(values["quantization_config"])
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bcq")


def test_a_stock_load_without_hcx_fails(compressed: Path) -> None:
    pytest.importorskip("transformers")
    script = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    answer = subprocess.run(
        [sys.executable, "-c", script, str(compressed)], capture_output=True, text=True, timeout=240, check=False
    )
    assert answer.returncode != 0
    assert "no file named model.safetensors" in answer.stderr


def test_registration_before_the_first_import_of_transformers_works(compressed: Path) -> None:
    pytest.importorskip("transformers")
    script = textwrap.dedent("""
        import sys
        from hcx.model.convert.registration import register
        register()
        assert "transformers" not in sys.modules
        import transformers
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(type(model.model.layers[1].self_attn.q_proj).__name__)
    """)
    answer = subprocess.run(
        [sys.executable, "-c", script, str(compressed)], capture_output=True, text=True, timeout=240, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split()[-1] == "BCQLinear"


def test_a_compressed_model_is_not_compressed_again(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already binary-coded"):
        compress_model(compressed, tmp_path / "again", CompressPlan())
    assert not (tmp_path / "again").exists()
