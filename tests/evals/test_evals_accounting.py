"""Bits per byte of `hcx eval`, of training's validation and of the n-gram baseline count the same bits and bytes."""

import json

import pytest
import torch

pytest.importorskip("lm_eval")

from hcx.data import bits_per_byte, validation_batches, validation_bytes, validation_documents
from hcx.evals import evaluate
from hcx.model.convert.hf import export_hf
from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import decoder_tensors, tiny_config, tiny_decoder
from hcx.tokenizer import Tokenizer

# Every document fits: in longer ones lm-eval gives the last window more context than validation does.
CONTEXT = 256


def test_evaluation_equals_validation_on_the_same_documents(tmp_path):
    shards = tiny_shards(tmp_path / "data")
    tokenizer = Tokenizer.load(next(shards.directory.rglob("tokenizer.json")).parent)
    model = tmp_path / "model"
    model.mkdir()
    tokenizer.save(model)
    config = tiny_config("llama", vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT)
    export_hf(model, config, decoder_tensors(tiny_decoder(config)).items(), tokenizer=model)

    items = tmp_path / "items"
    items.mkdir()
    texts = [tokenizer.decode(document.tolist()) for document in validation_documents(shards, "ko")]
    (items / "held_out_ko.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    decoder, nats = load_model(model).decoder, 0.0
    for batch in validation_batches(shards, "ko", CONTEXT, micro_batch=4):
        meta = ForwardMeta(positions=batch.positions, document_ids=batch.document_ids)
        with torch.no_grad():
            logprobs = decoder.output(decoder(batch.tokens, meta)).token_logprobs(batch.labels)
        nats -= float((logprobs * batch.weights).sum())
    expected = bits_per_byte(nats, validation_bytes(shards, "ko"))

    entry = evaluate(model, tasks=["hcx_bpb_ko"], data=items)["tasks"]["hcx_bpb_ko"]["metrics"]["bits_per_byte"]
    assert entry["n"] == len(texts) > 3
    assert entry["bytes"] == validation_bytes(shards, "ko")
    assert entry["value"] == pytest.approx(expected, rel=1e-5)
