"""The list of parameters that plans count is what the decoder builds, for every stage and tensor-parallel rank."""

from __future__ import annotations

import math

import pytest
import torch

from hcx.launch.roles import build_stage
from hcx.model.config import ModelConfig
from hcx.model.flops import parameter_count
from hcx.model.shapes import parameters_by_part, pipeline_stage, stage_chunks, stage_parameters
from hcx.testing.tiny import tiny_config

MODELS = {
    "llama": tiny_config("llama", num_layers=4),
    "llama-tied": tiny_config("llama", num_layers=4, tie_embeddings=True),
    "hyperclovax-tied": tiny_config("hyperclovax", num_layers=4, tie_embeddings=True),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_every_stage_lists_the_parameters_of_the_decoder_in_its_order(model: str, tp: int, pp: int) -> None:
    config = MODELS[model]
    for pp_rank in range(pp):
        stage = pipeline_stage(config, pp_rank, pp)
        decoder = build_stage(config, stage, tp, tp - 1, torch.float32)
        blocks = decoder.parameter_map()
        built = [
            (tuple(block.name for block in blocks[name]), tuple(p.shape), blocks[name][0].global_shape)
            for name, p in decoder.named_parameters()
        ]
        listed = [(p.names, p.shape, p.global_shapes[0]) for p in stage_parameters(config, stage, tp)]
        assert listed == built


def test_copies_of_a_tied_embedding_are_marked_only_where_stages_share_it() -> None:
    config = MODELS["llama-tied"]
    alone = stage_parameters(config, pipeline_stage(config, 0, 1))
    assert not any(parameter.tied_copy for parameter in alone)
    ends = [stage_parameters(config, pipeline_stage(config, rank, 4)) for rank in (0, 1, 3)]
    assert [sum(parameter.tied_copy for parameter in stage) for stage in ends] == [1, 0, 1]


@pytest.mark.parametrize(("pp", "chunks"), [(1, 1), (4, 1), (2, 2), (2, 4)])
def test_chunks_of_all_ranks_are_the_model_in_turns(pp: int, chunks: int) -> None:
    config = tiny_config(num_layers=8)
    held = [stage_chunks(config, rank, pp, chunks) for rank in range(pp)]
    assert [len(rank) for rank in held] == [chunks] * pp
    inorder = [held[number % pp][number // pp] for number in range(pp * chunks)]
    assert [layer for chunk in inorder for layer in chunk.layers] == list(range(8))
    assert [chunk.pre for chunk in inorder] == [number == 0 for number in range(pp * chunks)]
    assert [chunk.post for chunk in inorder] == [number == pp * chunks - 1 for number in range(pp * chunks)]


@pytest.mark.parametrize("model", MODELS)
def test_parts_add_up_to_the_number_of_parameters(model: str) -> None:
    counts = parameters_by_part(MODELS[model])
    assert sum(counts.values()) == parameter_count(MODELS[model])
    assert counts["output"] == (0 if MODELS[model].tie_embeddings else 384 * 64)


def test_a_published_model_has_its_published_number_of_parameters() -> None:
    # Llama 2 7B (Touvron et al. 2023): 6,738,415,616 parameters.
    llama = ModelConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, max_seq_len=4096
    )
    assert sum(parameters_by_part(llama).values()) == 6_738_415_616
    shares = [stage_parameters(llama, pipeline_stage(llama, rank, 8), 4) for rank in range(8)]
    split = sum(p.numel * (1 if p.part == "norm" else 4) for stage in shares for p in stage)
    assert split == 6_738_415_616 == sum(math.prod(s) for p in _whole(llama) for s in p.global_shapes)


def _whole(config: ModelConfig) -> list:
    return stage_parameters(config, pipeline_stage(config, 0, 1))
