"""The command line inside the test's process, and the overrides that make a shipped training recipe one of seconds."""

from __future__ import annotations

from pathlib import Path

from hcx.cli.main import main
from hcx.data import ShardSet


def hcx(*arguments: object) -> int:
    """Runs `hcx ARGUMENTS` and returns its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError("the command line returned without an exit code")


def small_run(shards: Path, out: Path, *more: str) -> list[str]:
    """Overrides of a recipe for text: two narrow layers, six steps of four rows; `more` comes last and holds."""
    return [
        f"data.shards={shards}",
        f"out={out}",
        f"model.vocab_size={ShardSet.open(shards).vocab_size}",
        "model.hidden_size=32",
        "model.intermediate_size=48",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.num_kv_heads=1",
        "data.seq_len=32",
        "train.steps=6",
        "train.global_batch=4",
        "train.micro_batch=2",
        "train.validate_every=3",
        "optim.schedule.warmup_steps=1",
        "validation.max_documents=2",
        *more,
    ]
