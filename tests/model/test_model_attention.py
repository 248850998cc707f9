"""Attention against a slow loop at both lengths of a context switch; grouped queries against repeated heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.parts.attention import attend
from hcx.model.parts.base import PlainParts
from hcx.model.rope import rotary_tables, rotate
from hcx.model.weights import TensorWeights, load_weights
from hcx.testing.batches import packed_rows
from hcx.testing.tiny import decoder_tensors, tiny_config, tiny_decoder

TOLERANCE = 2e-5
"""fp32 sums over up to 1,024 keys, against fp64."""
LOGITS_TOLERANCE = 2e-4
"""fp32 logits of size about 10, products summed in another order."""
LENGTHS = {128: 10000.0, 1024: 500000.0}
"""Rows of a context switch, each with the base of its stage."""


def naive(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, documents: Tensor, theta: float) -> Tensor:
    """Rotary attention by its definition, in fp64, one query at a time; everything `[seq, heads, head_dim]`."""
    seq, heads, dim = q.shape
    group = heads // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()

    def turned(x: Tensor, position: int) -> Tensor:
        result = x.clone()
        for pair in range(dim // 2):
            angle = position * theta ** (-2 * pair / dim)
            first, second = x[..., pair], x[..., pair + dim // 2]
            result[..., pair] = first * math.cos(angle) - second * math.sin(angle)
            result[..., pair + dim // 2] = first * math.sin(angle) + second * math.cos(angle)
        return result

    keys = torch.stack([turned(k[j], int(positions[j])) for j in range(seq)])
    out = torch.zeros(seq, heads, dim, dtype=torch.float64)
    for i in range(seq):
        query = turned(q[i], int(positions[i]))
        seen = [j for j in range(i + 1) if documents[j] == documents[i]]
        for head in range(heads):
            scores = keys[seen, head // group] @ query[head] / math.sqrt(dim)
            out[i, head] = torch.softmax(scores, 0) @ v[seen, head // group]
    return out.flatten(1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_that_of_a_loop_over_queries_at_both_lengths(length: int, packed: bool) -> None:
    theta, dim = LENGTHS[length], 8
    config = tiny_config(hidden_size=4 * dim, rope_theta=theta, max_seq_len=1024)
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(length, 1, heads, dim, generator=generator) for heads in (4, 2, 2))
    positions, documents = torch.arange(length)[None], torch.zeros(1, length, dtype=torch.int64)
    if packed:
        rows = packed_rows(1, length, 384, seed=1, max_document=length // 2)
        assert rows.document_ids is not None
        positions, documents = rows.positions, rows.document_ids
        assert int(documents.max()) > 0
    rotary = rotary_tables(config, positions, length, q)
    meta = ForwardMeta(positions=positions, document_ids=documents if packed else None)
    found = attend(rotate(q, rotary), rotate(k, rotary), v, meta, 0, config.attention_scale)
    expected = naive(q[:, 0], k[:, 0], v[:, 0], positions[0], documents[0], theta)
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("length", LENGTHS)
def test_grouped_queries_are_all_heads_with_repeated_keys_and_values(length: int) -> None:
    options = {"rope_theta": LENGTHS[length], "max_seq_len": 1024, "num_heads": 4}
    grouped_config = tiny_config(num_kv_heads=2, **options)
    full_config = ModelConfig(**{**grouped_config.model_dump(), "num_kv_heads": 4})
    grouped = tiny_decoder(grouped_config)
    dim = grouped_config.head_size

    def repeated(name: str) -> Tensor:
        tensor = decoder_tensors(grouped)[name]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            tensor = tensor.unflatten(0, (2, dim)).repeat_interleave(2, dim=0).flatten(0, 1)
        return tensor

    full = Decoder(full_config, PlainParts())
    load_weights(full, full.parameter_map(), TensorWeights(repeated, "grouped"))
    rows = packed_rows(2, length, grouped_config.vocab_size, seed=2, max_document=length)
    meta = ForwardMeta(positions=rows.positions, document_ids=rows.document_ids)
    with torch.no_grad():
        one, two = (decoder.output(decoder(rows.tokens, meta)).logits() for decoder in (grouped, full))
    torch.testing.assert_close(one, two, rtol=0.0, atol=LOGITS_TOLERANCE)
