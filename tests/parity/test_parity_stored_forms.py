"""Pruned, encoded and clustered weights through transformers: the logits of hcx."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hcx.compress import CompressPlan, ModulePlan, PlanRule, compress_model
from hcx.compress.clusters import Clusters
from hcx.compress.prune_plan import Pruning
from hcx.model.convert import registration
from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_model_directory


def test_transformers_reads_every_stored_form_to_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = tiny_model_directory(tmp_path / "full", with_tokenizer=False)
    tiny_shards(tmp_path, documents=12, vocab_size=384)
    plan = CompressPlan(
        default=ModulePlan(bits=3, group_size=32, prune=Pruning(sparsity=0.6, storage="fixed_to_fixed")),
        rules=(PlanRule(pattern="*.up_proj", prune=Pruning(sparsity=0.5, storage="raw")),),
        embedding=ModulePlan(bits=4, group_size=64, clusters=Clusters(shards=str(tmp_path / "shards"))),
    )
    compress_model(source, tmp_path / "bcq", plan)
    registration.register()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "bcq", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    decoder = load_model(tmp_path / "bcq").decoder
    tokens = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = decoder.output(decoder(tokens, ForwardMeta())).logits()
        found = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
