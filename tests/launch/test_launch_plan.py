"""Plans: counted against independent sums, closed forms and measured activations; what is said to fit does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from hcx.artifacts import find_resource, resource_names
from hcx.cli.main import main
from hcx.engine.config import DeepSpeedEngineConfig, MegatronEngineConfig, TorchEngineConfig
from hcx.engine.footprint import AnyEngineConfig, held_bytes
from hcx.engine.legality import violations
from hcx.errors import ConfigError, HcxError, LaunchError
from hcx.launch.costs import LayoutCosts, Workload
from hcx.launch.plan import make_plan, require_fit
from hcx.launch.profiles import GIB, load_profile, profile_names
from hcx.model.flops import training_flops_per_token
from hcx.model.meta import ForwardMeta
from hcx.optim import OptimConfig
from hcx.recipe import load_train_recipe
from hcx.testing.tiny import tiny_config, tiny_decoder

SHIPPED = {"125m": (125e6, 1), "1.3b": (1.3e9, 8), "7b": (7e9, 64), "70b": (70e9, 512)}
ADAMW = OptimConfig()


def shipped(name: str, *overrides: str) -> Any:
    return load_train_recipe(find_resource(f"launch/train/{name}.yaml"), overrides)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sizes_have_the_parameters_and_gpus_that_they_name_and_fit(name: str) -> None:
    recipe = shipped(name)
    plan = make_plan(recipe, load_profile("h100"))
    wanted, gpus = SHIPPED[name]
    assert sum(plan.parameters.values()) == pytest.approx(wanted, rel=0.03)
    assert plan.chosen.world_size == gpus
    require_fit(plan, recipe)
    assert 0.2 < plan.utilisation < load_profile("h100").gpu.achieved_fraction + 1e-9


@pytest.mark.parametrize("name", ["1.3b", "70b"])
def test_ranked_layouts_are_legal_sorted_and_hold_the_recipes_own(name: str) -> None:
    recipe = shipped(name)
    plan = make_plan(recipe, load_profile("h100"))
    times = [layout.time.total for layout in plan.ranked]
    assert times == sorted(times)
    assert recipe.engine in [layout.engine for layout in plan.ranked]
    for layout in plan.ranked:
        count = recipe.train.global_batch // layout.micro_batch
        known = (recipe.model, layout.world_size, recipe.data.seq_len, "adamw", count)
        assert violations(layout.engine, *known) == []
        assert layout.fullest.total <= plan.profile.usable_bytes
        assert recipe.train.global_batch % (layout.micro_batch * (layout.engine.data_parallel or 1)) == 0
    chunks = {getattr(layout.engine, "virtual_pipeline_parallel", 1) for layout in plan.ranked}
    assert chunks > {1, 2} if name == "70b" else chunks >= {1}


def test_the_70b_needs_its_parallelism_and_no_replica_holds_it() -> None:
    # 18 bytes per parameter without sharding: Rajbhandari et al. 2020, section 3.1, with fp32 gradients.
    recipe = shipped("70b", "engine={kind: torch, precision: bf16, data_parallel: 512}")
    memory = make_plan(recipe, load_profile("h100")).chosen.memory[0]
    assert memory.held.total == 18 * memory.parameters


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("70b", ["engine.pipeline_parallel=1", "engine.data_parallel=8", "engine.distributed_optimizer=false"]),
        ("7b", ["engine.tensor_parallel=1", "engine.sequence_parallel=false", "engine.data_parallel=4"]),
        ("1.3b", ["train.micro_batch=16"]),
        ("7b", ["engine={kind: torch, precision: bf16, data_parallel: 64}"]),
    ],
)
def test_what_is_said_to_fit_fits(name: str, overrides: list[str]) -> None:
    recipe, profile = shipped(name, *overrides), load_profile("h100")
    plan = make_plan(recipe, profile)
    with pytest.raises(LaunchError) as caught:
        require_fit(plan, recipe)
    lines = str(caught.value).splitlines()
    assert f"does not fit {plan.chosen.world_size} x NVIDIA H100" in lines[0]
    offers = [line.split(" GPUs: ")[1] for line in lines[1:]]
    assert offers
    for offer in offers:
        other = shipped(name, *overrides, *offer.split(" "))
        require_fit(make_plan(other, profile), other)


def test_a_model_that_fits_no_number_of_gpus_is_refused_with_what_to_change() -> None:
    recipe = shipped("70b", "data.seq_len=1048576", "model.max_seq_len=1048576", "train.global_batch=16")
    with pytest.raises(LaunchError, match="shorter rows"):
        require_fit(make_plan(recipe, load_profile("a100-80g")), recipe)


def test_an_illegal_layout_is_refused_with_the_nearest_legal_one() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(shipped("70b", "engine.tensor_parallel=3"), load_profile("h100"))
    message = str(caught.value)
    assert "engine.tensor_parallel = 3: does not divide model.num_kv_heads = 8" in message
    near = message.splitlines()[-1].split(": ")[1].split(" ")
    make_plan(shipped("70b", "engine.tensor_parallel=3", *near, "train.global_batch=1536"), load_profile("h100"))


def test_an_interleaved_recipe_needs_whole_groups_of_micro_batches() -> None:
    recipe = shipped("70b", "engine.virtual_pipeline_parallel=5", "train.global_batch=96")
    with pytest.raises(ConfigError, match="groups of pipeline_parallel = 4, and a step has 6 on each replica"):
        make_plan(recipe, load_profile("h100"))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("tied", [False, True])
def test_operations_of_all_ranks_are_those_of_the_model(tp: int, pp: int, tied: bool) -> None:
    model = tiny_config(num_layers=4, tie_embeddings=tied)
    engine = MegatronEngineConfig(tensor_parallel=tp, pipeline_parallel=pp)
    costs = LayoutCosts(engine, model, ADAMW, tp * pp, Workload(16, 64, 512))
    total = tp * sum(costs.flops(rank) for rank in range(pp))
    assert total == pytest.approx(64 * training_flops_per_token(model, 16), rel=1e-12)


def test_operations_of_the_forward_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_config(num_layers=3)
    decoder = tiny_decoder(model)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder.output(decoder(tokens, ForwardMeta())).logits()
    # torch counts attention over the whole square, the formula the causal half of it.
    square = 2 * 2 * 16 * model.num_heads * model.head_size * model.num_layers * 32
    counted = counter.get_total_flops()
    matrices = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert counted in (matrices, matrices + square)
    formula = 32 * training_flops_per_token(model, 16) / 3
    assert formula == pytest.approx(matrices + square / 2, rel=1e-12)


def saved_bytes(model_options: dict[str, Any], rows: int, seq_len: int, recompute: bool, dtype: torch.dtype) -> int:
    """Bytes of distinct storages that autograd keeps for one forward, weights aside."""
    decoder = tiny_decoder(tiny_config(**model_options)).to(dtype)
    decoder.activation_checkpointing = recompute
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder(tokens, ForwardMeta())
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 4])
def test_activations_are_those_that_autograd_keeps(rows: int, precision: str, recompute: bool) -> None:
    # Wide enough that tables of positions and one number per token are small beside it.
    options = {"hidden_size": 256, "intermediate_size": 704, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2}
    model, seq_len = tiny_config(**options), 128
    engine = TorchEngineConfig(precision=precision, activation_checkpointing=recompute)
    costs = LayoutCosts(engine, model, ADAMW, 1, Workload(seq_len, rows * seq_len, rows * seq_len))
    logits = rows * seq_len * model.vocab_size * costs.size
    planned = costs.memory(0).activations - logits
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    measured = saved_bytes(options, rows, seq_len, recompute, dtype)
    # The final norm's output is kept by the output, which is not run here; a checkpoint keeps what it is given.
    final = rows * seq_len * model.hidden_size * costs.size
    assert planned - final == pytest.approx(measured, rel=0.10)


def communicated(engine: AnyEngineConfig, world_size: int, micro_batches: int = 4) -> Any:
    work = Workload(16, 16, 16 * micro_batches * world_size)
    model = tiny_config(num_layers=4)
    costs = LayoutCosts(engine, model, ADAMW, world_size, work)
    return costs, costs.communication(0)


def test_communication_between_replicas_follows_zero() -> None:
    # Rajbhandari et al. 2020, section 7: all-reduce and ZeRO with sharded gradients move as much, stage 3 half as much
    # again per pass, where gradients and weights have one precision.
    whole = held_bytes(TorchEngineConfig(), tiny_config(num_layers=4), ADAMW, 1).weights
    share = 3 / 4
    assert communicated(TorchEngineConfig(), 4)[1].data_parallel == 2 * share * whole
    sharded = communicated(MegatronEngineConfig(distributed_optimizer=True), 4)[1].data_parallel
    assert sharded == 2 * share * whole
    third = communicated(DeepSpeedEngineConfig(zero_stage=3), 4, micro_batches=1)[1].data_parallel
    assert third == 3 * share * whole
    assert communicated(TorchEngineConfig(), 1)[1].data_parallel == 0


def test_communication_of_tensor_and_pipeline_ranks_grows_with_micro_batches_and_recomputation() -> None:
    costs, sent = communicated(MegatronEngineConfig(tensor_parallel=2), 2)
    # Four sums of [tokens, hidden] per block, one at the embedding and one at the output, each 2 (t - 1) / t.
    assert costs.micro_batches == 8
    assert sent.tensor_parallel == 8 * (4 * 4 + 2) * 16 * 64 * 4
    again = communicated(MegatronEngineConfig(tensor_parallel=2, activation_checkpointing=True), 2)[1]
    assert again.tensor_parallel == 8 * (6 * 4 + 2) * 16 * 64 * 4
    piped = communicated(MegatronEngineConfig(pipeline_parallel=2), 2)[1]
    assert piped.pipeline_parallel == 8 * 16 * 64 * 4


def test_a_pipeline_waits_as_long_as_its_stages_fill() -> None:
    # Narayanan et al. 2021, section 2.2: bubble over ideal time = (p - 1) / m.
    costs, _ = communicated(MegatronEngineConfig(pipeline_parallel=4), 4, micro_batches=2)
    time = costs.time(load_profile("h100"))
    assert time.bubble / (time.compute + time.pipeline_parallel) == pytest.approx(3 / 8)


INTERLEAVED = MegatronEngineConfig(pipeline_parallel=2, virtual_pipeline_parallel=2)


def test_an_interleaved_pipeline_waits_less_and_sends_more() -> None:
    # Narayanan et al. 2021, section 2.2.2: with v chunks the bubble is (p - 1) / (v m), and v times as much is sent.
    costs, sent = communicated(INTERLEAVED, 2)
    time = costs.time(load_profile("h100"))
    assert time.bubble / (time.compute + time.pipeline_parallel) == pytest.approx(1 / (2 * 8))
    # Rank 0: two outputs and one gradient of each micro-batch.
    assert sent.pipeline_parallel == 3 * 8 * 16 * 64 * 4
    plain, _ = communicated(MegatronEngineConfig(pipeline_parallel=2), 2)
    assert [costs.flops(rank) for rank in range(2)] == [plain.flops(rank) for rank in range(2)]


@pytest.mark.parametrize(("micro_batches", "forwards"), [(4, [5, 3]), (1, [4, 3])])
def test_an_interleaved_pipeline_keeps_the_forwards_before_its_first_backward(
    micro_batches: int, forwards: list[int]
) -> None:
    # Narayanan et al. 2021, figure 4: 2 (p - 1 - rank) + (v - 1) p forwards of one chunk, one more, at most all.
    costs, _ = communicated(INTERLEAVED, 2, micro_batches)
    deep, _ = communicated(MegatronEngineConfig(pipeline_parallel=4), 4, micro_batches=8)
    one = deep.memory(3).activations - (deep._logits_bytes() + 2 * 16 * 64 * 4)
    found = [costs.memory(rank).activations for rank in range(2)]
    found[1] -= round(costs._logits_bytes() + 2 * 16 * 64 * 4)
    assert found == [count * one for count in forwards]


def test_links_within_a_node_are_used_only_by_ranks_of_one_node() -> None:
    profile = load_profile("h100")
    costs, _ = communicated(TorchEngineConfig(), 8)
    assert costs._bandwidth(profile, 8, 1) == 450e9
    assert costs._bandwidth(profile, 16, 1) == 400e9  # eight adapters of 50 GB/s
    assert costs._bandwidth(profile, 2, 8) == 50e9


def test_every_shipped_profile_loads_and_names_itself() -> None:
    assert set(profile_names()) >= {"h100", "h200", "a100-80g", "laptop"}
    for name in profile_names():
        assert load_profile(name).name == name


def test_a_profile_with_a_missing_or_wrong_field_names_it(tmp_path: Path) -> None:
    text = find_resource("slurm/profiles/h100.yaml").read_text(encoding="utf-8")
    short = tmp_path / "short.yaml"
    short.write_text(text.replace("  hbm_gb_s: 3350\n", ""), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"gpu\.hbm_gb_s"):
        load_profile(str(short))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("gpus_per_node: 8", "gpus_per_node: 0"), encoding="utf-8")
    with pytest.raises(ConfigError, match="gpus_per_node = 0"):
        load_profile(str(wrong))
    with pytest.raises(LaunchError, match="did you mean 'h100'"):
        load_profile("h10")


def test_the_batch_systems_settings_pass_through_a_profile(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    text = find_resource("slurm/profiles/h200.yaml").read_text(encoding="utf-8")
    own.write_text(text + "slurm:\n  partition: gpu\n  modules: [cuda/12]\n", encoding="utf-8")
    assert load_profile(str(own)).slurm == {"partition": "gpu", "modules": ["cuda/12"]}


def test_every_shipped_training_recipe_is_planned_or_refused_by_name() -> None:
    for name in resource_names("launch/train"):
        try:
            recipe = load_train_recipe(find_resource(name))
        except HcxError:  # a recipe whose base model is not on this machine
            continue
        if recipe.adapter is not None:
            with pytest.raises(ConfigError, match="adapter"):
                make_plan(recipe, load_profile("h100"))
        else:
            assert make_plan(recipe, load_profile("h100")).chosen.fits


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "plan", "launch/train/7b.yaml")
    assert code == 0
    assert "3 (2 P + 2 S H D L)" in text
    assert "6,996,365,312" in text
    code, text, _ = run(capsys, "plan", "launch/train/7b.yaml", "--profile", "h200", "--json")
    plan = json.loads(text)
    assert (code, plan["fits"], plan["layout"]["gpus"]) == (0, True, 64)
    (memory,) = plan["layout"]["memory"]
    parts = ("weights", "gradients", "masters", "optimizer_state", "activations", "workspace")
    assert memory["total"] == sum(memory[part] for part in parts)
    # bf16, each matrix over two ranks, the norms on both.
    assert memory["weights"] == pytest.approx(plan["parameters"]["total"], rel=1e-3)
    assert math.isclose(
        sum(v for k, v in plan["layout"]["step_seconds"].items() if k != "total"),
        plan["layout"]["step_seconds"]["total"],
    )


def test_the_command_ends_with_2_when_it_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("engine.tensor_parallel=1", "engine.sequence_parallel=false", "engine.data_parallel=4")
    code, text, error = run(capsys, "plan", "launch/train/7b.yaml", *arguments, "--json")
    assert code == 2
    assert json.loads(text)["fits"] is False
    assert "what fits on 4 GPUs: engine.activation_checkpointing=true" in error
    assert "Traceback" not in error


def test_a_profile_with_more_memory_fits_more() -> None:
    overrides = ("engine.tensor_parallel=1", "engine.sequence_parallel=false", "engine.data_parallel=4")
    recipe = shipped("7b", *overrides)
    small, large = (make_plan(recipe, load_profile(name)) for name in ("h100", "h200"))
    assert not small.chosen.fits
    assert large.chosen.fits
    assert small.chosen.memory == large.chosen.memory
    assert large.profile.usable_bytes - small.profile.usable_bytes == 60 * GIB


def test_recomputation_trades_activations_for_time() -> None:
    plan = make_plan(shipped("7b"), load_profile("h100"))
    assert plan.switched.overrides == ("engine.activation_checkpointing=true",)
    kept, again = plan.chosen, plan.switched
    assert again.fullest.activations < kept.fullest.activations / 4
    assert again.fullest.held == kept.fullest.held
    assert again.time.compute == pytest.approx(kept.time.compute * 4 / 3)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_takes_host_memory_and_time_instead(stage: int) -> None:
    plain, offloaded = (
        make_plan(
            shipped("1.3b", f"engine.zero_stage={stage}", f"engine.offload_optimizer={place}"), load_profile("h100")
        )
        for place in ("none", "cpu")
    )
    one, other = plain.chosen.memory[0].held, offloaded.chosen.memory[0].held
    # On the accelerator the weights are left; masters, moments and the gradients' shares are not.
    assert other.total == other.weights == one.weights
    assert other.optimizer == one.optimizer
    assert other.host > one.optimizer + one.gradients
    assert offloaded.chosen.time.optimizer > plain.chosen.time.optimizer


def test_a_run_of_a_whole_cluster_is_not_started_on_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "train", "launch/train/70b.yaml")
    assert code == 2
    assert "70b needs 512 processes" in error
    assert "--rehearse" in error
