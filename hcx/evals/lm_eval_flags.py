"""Which command lines are lm-eval's: its flags and subcommands by name, and what stands for ours in its form.

Read without lm-eval: `hcx eval` decides by it before anything heavy is imported. A test holds the list against the
parser of the installed lm-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hcx.errors import EvalError

SUBCOMMANDS = ("run", "ls", "validate")
"""lm-eval's own verbs."""

SHARED_FLAGS = frozenset({"--tasks", "--limit", "--device", "--help", "-h"})
"""Flags that both command lines have; they do not tell which one it is."""

LM_EVAL_FLAGS = frozenset(
    {
        "--config",
        "-C",
        "-t",
        "--model",
        "-M",
        "--model_args",
        "-a",
        "--apply_chat_template",
        "-L",
        "--use_cache",
        "-c",
        "--num_fewshot",
        "-f",
        "--batch_size",
        "-b",
        "--max_batch_size",
        "--gen_kwargs",
        "--output_path",
        "-o",
        "--log_samples",
        "-s",
        "--samples",
        "-E",
        "--cache_requests",
        "--check_integrity",
        "--system_instruction",
        "--fewshot_as_multiturn",
        "--include_path",
        "--verbosity",
        "-v",
        "--write_out",
        "-w",
        "--show_config",
        "--wandb_args",
        "--wandb_config_args",
        "--trackio_args",
        "--hf_hub_log_args",
        "--predict_only",
        "-x",
        "--seed",
        "--trust_remote_code",
        "--confirm_run_unsafe_code",
        "--metadata",
    }
)
"""Flags of `lm-eval run` that `hcx eval MODEL` does not have."""

INSTEAD = {
    "--suite": "name the tasks in --tasks, or use hcx eval MODEL --suite NAME",
    "--out": "use --output_path",
    "--batch-size": "use --batch_size",
    "--deterministic": "use --model_args pretrained=MODEL,deterministic=true",
    "--adapter": "use --model_args pretrained=MODEL,adapter=DIR",
    "--numerics": "use --model_args pretrained=MODEL,numerics=NAME",
    "--dtype": "use --model_args pretrained=MODEL,dtype=NAME",
    "--json": "use --output_path, which gives lm-eval's JSON",
    "--list": "use hcx eval --list alone, or hcx eval ls tasks",
    "--check": "use hcx eval --check alone, or hcx eval validate --tasks NAMES",
    "--from": "use --data BUNDLE, which hcx eval fetch NAMES --from FOLDER --out BUNDLE makes",
    "--language": "it belongs to hcx eval table",
    "--against": "it belongs to hcx eval contamination",
    "--poll": "it belongs to hcx eval watch",
}
"""Flags of `hcx eval MODEL` that lm-eval's form does not have -> what does the same there."""

IN_OUR_FORM = {
    "--batch_size": "--batch-size",
    "-b": "--batch-size",
    "--output_path": "--out",
    "-o": "--out",
    "-t": "--tasks",
    "-L": "--limit",
}
"""Flags of lm-eval that `hcx eval MODEL` has under another name."""


def _flag(word: str) -> str:
    return word.split("=", 1)[0]


def is_lm_eval_line(words: Sequence[str]) -> bool:
    """Whether what follows `hcx eval` is a command line of lm-eval.

    Args:
        words: the arguments.

    Raises:
        EvalError: a model directory comes first, which is our form, and a flag of lm-eval after it.
    """
    theirs = [_flag(word) for word in words if _flag(word) in LM_EVAL_FLAGS]
    if not words or words[0].startswith("-"):
        return bool(theirs)
    if words[0] in SUBCOMMANDS and not Path(words[0]).exists():
        return True
    if theirs:
        ours = IN_OUR_FORM.get(theirs[0])
        same = "" if ours is None else f"with a directory it is called {ours}; or "
        raise EvalError(
            f"{theirs[0]} is a flag of lm-eval, and {words[0]!r} without a flag is not its form: {same}write the "
            f"whole line as for lm_eval: hcx eval --model hcx --model_args pretrained={words[0]} --tasks NAMES "
            f"{theirs[0]} ..."
        )
    return False


def split_line(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words for lm-eval's parser, and what `--data` names: the one flag of ours that its form takes too.

    Raises:
        EvalError: another flag of ours, with what does the same.
    """
    rest: list[str] = []
    data: str | None = None
    given = iter(words)
    for word in given:
        flag, _, value = word.partition("=")
        if flag == "--data":
            data = value or next(given, "")
            if not data or data.startswith("-"):
                raise EvalError("--data: name a bundle of hcx eval fetch, or a folder of item files")
            continue
        # Refused here by name: the parser would take some of them for the beginning of a flag of its own.
        if flag in INSTEAD:
            raise EvalError(f"{flag} is not a flag of lm-eval, whose form this line has: {INSTEAD[flag]}")
        rest.append(word)
    return rest, data
