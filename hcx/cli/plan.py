"""`hcx plan`: memory, FLOPs, communication and time of a recipe on a cluster, and the legal layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from hcx.launch.plan import Layout, Plan

SHOWN = 8
"""Ranked layouts in the table; `--json` has all of them."""


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("plan")(plan)


def plan(
    recipe: Annotated[str, typer.Argument(help="YAML recipe, such as launch/train/70b.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as engine.zero_stage=2")] = None,
    profile: Annotated[str, typer.Option(help="cluster: a name in slurm/profiles, or a YAML file")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
) -> None:
    """Counts what a recipe needs on a cluster; exit code 2 when it cannot fit, with what would."""
    from hcx.artifacts import find_file
    from hcx.launch.plan import make_plan, require_fit
    from hcx.launch.profiles import load_profile
    from hcx.recipe import load_train_recipe

    loaded = load_train_recipe(find_file(recipe, "launch/train"), overrides or ())
    made = make_plan(loaded, load_profile(profile))
    if as_json:
        print_json(made.to_json())
    else:
        _show(made)
    require_fit(made, loaded)


def _show(made: Plan) -> None:
    from hcx.launch.plan import FLOPS_FORMULA

    chosen, profile = made.chosen, made.profile
    total = sum(made.parameters.values())
    rows = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in made.parameters.items() if count]
    table(f"{made.name}: parameters", ("part", "number", "share"), [*rows, ("total", f"{total:,}", "")])
    echo(f"FLOPs per token: {made.flops_per_token:.4g} = {FLOPS_FORMULA}")
    echo(f"Layout: {describe(chosen)} on {chosen.world_size} x {profile.gpu.name} (profile {profile.name})")
    echo()
    table(
        f"GiB per rank, by pipeline stage; {profile.usable_bytes / 2**30:.1f} of {profile.gpu.memory_gib:g} are free",
        ("stage", "weights", "grads", "masters", "moments", "activ.", "work", "total"),
        [
            (str(memory.pp_rank), *(f"{size / 2**30:.2f}" for size in sizes), f"{memory.total / 2**30:.2f}")
            for memory in chosen.memory
            for held in (memory.held,)
            for sizes in (
                (held.weights, held.gradients, held.masters, held.state, memory.activations, memory.workspace),
            )
        ],
    )
    host = max(memory.held.host for memory in chosen.memory)
    if host:
        echo(
            f"Each rank keeps {host / 2**30:.2f} GiB of gradients, masters and moments in host memory, outside of the "
            "total"
        )
    other = made.switched
    echo(
        f"With {other.overrides[0]}: {other.fullest.total / 2**30:.2f} GiB on the fullest stage "
        f"({other.fullest.activations / 2**30:.2f} of activations), {other.time.total:.3f} s per step"
    )
    echo()
    sent, time = chosen.communication, chosen.time
    table(
        "One optimizer step (estimated)",
        ("kind", "GB sent per rank", "seconds"),
        [
            ("matrix products", "", f"{time.compute:.3f}"),
            ("pipeline bubble", "", f"{time.bubble:.3f}"),
            ("tensor parallel", f"{sent.tensor_parallel / 1e9:.2f}", f"{time.tensor_parallel:.3f}"),
            ("pipeline parallel", f"{sent.pipeline_parallel / 1e9:.2f}", f"{time.pipeline_parallel:.3f}"),
            ("data parallel", f"{sent.data_parallel / 1e9:.2f}", f"{time.data_parallel:.3f}"),
            ("optimizer", "", f"{time.optimizer:.3f}"),
            ("total", "", f"{time.total:.3f}"),
        ],
    )
    echo(
        f"{made.tokens_per_step:,} tokens per step, {made.tokens_per_step / time.total:,.0f} tokens/s, "
        f"{made.utilisation:.0%} of peak; {made.total_tokens:,} tokens in {made.days:.1f} days"
    )
    echo()
    table(
        f"Legal layouts that fit {chosen.world_size} GPUs, fastest first ({len(made.ranked)} in all)",
        ("layout", "GiB", "s/step", "micro"),
        [
            (
                describe(layout) + (" <" if layout.engine == chosen.engine else ""),
                f"{layout.fullest.total / 2**30:.1f}",
                f"{layout.time.total:.3f}",
                layout.micro_batch,
            )
            for layout in made.ranked[:SHOWN]
        ],
    )


def describe(layout: Layout) -> str:
    """The engine's settings in a few words."""
    engine = layout.engine
    words: list[str] = [engine.kind]
    if engine.kind == "deepspeed":
        words.append(f"zero {engine.zero_stage}")
        words += ["offload"] * (engine.offload_optimizer == "cpu")
    if engine.kind == "megatron":
        chunks = f"x{engine.virtual_pipeline_parallel}" if engine.virtual_pipeline_parallel > 1 else ""
        words.append(f"tp {engine.tensor_parallel} pp {engine.pipeline_parallel}{chunks}")
    words.append(f"dp {engine.data_parallel or 1}")
    if engine.kind == "megatron":
        words += ["sp"] * engine.sequence_parallel + ["distributed optimizer"] * engine.distributed_optimizer
    return " ".join([*words, *(["recompute"] if engine.activation_checkpointing else [])])
