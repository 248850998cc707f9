"""At 64 and 512 GPUs megatron-core's own buffers and optimizer take the bytes that plans count, on the meta device.

A process group that communicates nothing (torch's `fake` backend) lets one process be any rank of a large run: the
library lays out its buffers and shards its masters as there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hcx.artifacts import find_resource
from hcx.engine.footprint import held_bytes
from hcx.recipe import load_train_recipe

RANKS = {
    # First, middle and last stage; first and last replica, whose shares of the padding differ.
    "70b": (512, [0, 8 * 15, 8 * 16, 8 * 16 * 3, 511]),
    "7b": (64, [0, 2, 63]),
}


class _MetaLooksLikeCuda(TorchFunctionMode):
    """The library compares names of tensor types."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        return answer.replace("meta.", "") if func is torch.Tensor.type and isinstance(answer, str) else answer


def build_on_meta(name: str, rank: int, world_size: int) -> dict[str, Any]:
    """One rank's stage, buffers and optimizer, as the engine builds them, without memory."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from hcx.dist import Topology, rehearsal
    from hcx.engine.common import storage_bytes
    from hcx.engine.megatron_masters import MegatronMasters
    from hcx.engine.megatron_stage import (
        StageChunk,
        acquire_groups,
        build_optimizer,
        library_config,
        mark_sharded,
        mark_tied,
        wrap,
    )
    from hcx.engine.sharded import local_groups
    from hcx.model.decoder import Decoder
    from hcx.model.parts.megatron import MegatronParts
    from hcx.model.shapes import pipeline_stage
    from hcx.optim import parameter_groups, state_keys

    recipe = load_train_recipe(find_resource(f"launch/train/{name}.yaml"))
    engine, model, optim = recipe.engine, recipe.model, recipe.optim
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    place = Topology(rank, world_size, tp_size=engine.tensor_parallel, pp_size=engine.pipeline_parallel)
    stage = pipeline_stage(model, place.pp_rank, place.pp_size)
    rehearsal.enable()
    with rehearsal.redirected(), _MetaLooksLikeCuda():
        torch.cuda.current_device = lambda: torch.device("meta")  # put back when the redirection ends
        acquire_groups(place)
        parts = MegatronParts(engine.sequence_parallel, torch.bfloat16, "meta")
        decoder = Decoder(model, parts, layers=stage.layers, pre=stage.pre, post=stage.post)
        parameters, blocks = dict(decoder.named_parameters()), decoder.parameter_map()
        mark_sharded(parameters, blocks)
        tied = mark_tied(decoder, place)
        shapes = {block.name: block.global_shape for found in blocks.values() for block in found}
        groups = parameter_groups(shapes, optim)
        chunk = wrap(StageChunk(library_config(engine, model), decoder, tied), engine)
        members = local_groups(blocks, groups, frozenset(shapes))
        _, inner = build_optimizer([chunk], parameters, members, len(groups), optim, engine)
        layout: Any = None
        masters = MegatronMasters(parameters, inner, layout, state_keys(groups[0], optim))
        gradients = [parameter.main_grad for parameter in parameters.values()]
        held = {"weights": list(parameters.values()), "gradients": gradients, "optimizer": masters.held()}
        sizes = storage_bytes(held)
    torch.distributed.destroy_process_group()
    return {**sizes, "pp_rank": place.pp_rank, "dp_rank": place.dp_rank}


@pytest.mark.parametrize("name", RANKS)
def test_the_librarys_buffers_of_the_real_shape_take_the_planned_bytes(name: str) -> None:
    # In a process of its own: the fake group would stand in the way of the others.
    command = [sys.executable, __file__, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = load_train_recipe(find_resource(f"launch/train/{name}.yaml"))
    world_size, ranks = RANKS[name]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(ranks)
    for held in found:
        planned = held_bytes(
            recipe.engine, recipe.model, recipe.optim, world_size, held.pop("pp_rank"), held.pop("dp_rank")
        )
        assert held == {
            "weights": planned.weights,
            "gradients": planned.gradients,
            "optimizer": planned.optimizer,
        }
        assert planned.weights > 1 << 30


if __name__ == "__main__":
    world, chosen = RANKS[sys.argv[1]]
    print(json.dumps([build_on_meta(sys.argv[1], rank, world) for rank in chosen]))
