"""lm-eval's own command with hcx in it: behind `hcx eval` with lm-eval's flags, and `python -m hcx.lm_eval`.

Its parser, evaluator and files are lm-eval's; what is added is the model `hcx`, our tasks, binary-coded weights for
`--model hf`, data from a bundle, and a refusal, before any work, of what could not be honoured.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hcx.errors import EvalError, MissingExtra, did_you_mean
from hcx.evals.bundle import replaying
from hcx.evals.catalog import find_tasks, is_installed, task_cards, tasks_directory
from hcx.evals.lm_eval_flags import split_line
from hcx.evals.sources import data_directory

ALLOW_CODE = "--allow-code"

MODEL_ARGUMENTS = {
    "trust_remote_code": "hcx runs no code from a model directory; --model hf does",
    "max_batch_size": "it belongs to batch_size=auto; give batch_size=N",
    "peft": "use adapter=DIR",
    "delta": "hcx convert merges weights beforehand",
    "load_in_8bit": "hcx compress MODEL makes a compressed directory to evaluate",
    "load_in_4bit": "hcx compress MODEL makes a compressed directory to evaluate",
    "autogptq": "hcx convert reads the directory's weights beforehand",
    "gptqmodel": "hcx convert reads the directory's weights beforehand",
    "gguf_file": "use pretrained=FILE.gguf",
    "parallelize": "the model is computed on one device: device=cuda:0",
    "device_map": "the model is computed on one device: device=cuda:0",
    "tp_plan": "the model is computed on one device: device=cuda:0",
    "tokenizer": "the tokenizer is the one in the model directory",
    "revision": "pretrained is a local directory, which has one revision",
    "subfolder": "use pretrained=DIR/SUBFOLDER",
    "backend": "leave it out: the model is a causal decoder",
}
"""Arguments of lm-eval's `hf` model that `hcx` does not have -> what to do."""


def refuse_foreign_code(folders: Iterable[Path]) -> None:
    """Task files name functions (`!function`) and lie beside modules that are imported: such a folder is a program.

    Raises:
        EvalError: a folder that is not ours holds code.
    """
    own = tasks_directory().resolve()
    for folder in folders:
        if folder.resolve().is_relative_to(own) or not folder.is_dir():
            continue
        for path in sorted(folder.rglob("*")):
            is_task = path.suffix in (".yaml", ".yml") or path.name.endswith("_yaml")
            if path.suffix == ".py" or (is_task and "!function" in path.read_text(encoding="utf-8", errors="replace")):
                raise EvalError(
                    f"{folder}: holds code ({path.name}) that would run here; read it, then give {ALLOW_CODE}"
                )


def _task_folders(include_path: Any, tasks: Any) -> list[Path]:
    """Folders from which task files would be loaded: included ones, and those named as tasks."""
    included = include_path if isinstance(include_path, (list, tuple)) else [include_path] if include_path else []
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks or ())
    named = [Path(name) for name in names if isinstance(name, str)]
    return [
        *map(Path, included),
        *(path.parent for path in named if path.suffix == ".yaml"),
        *(path for path in named if path.is_dir() and any(path.glob("*.yaml"))),
    ]


def _refuse_for_hcx(settings: Any) -> None:
    """Refuses what the model `hcx` would have to ignore; `settings` is lm-eval's EvaluatorConfig."""
    from hcx.evals.lm import HcxLM, batch_rows, sampling_params

    batch_rows(settings.batch_size)
    known = [name for name in inspect.signature(HcxLM.__init__).parameters if name != "self"]
    for name, value in (*settings.model_args.items(), ("max_batch_size", settings.max_batch_size)):
        if value is None or value is False:
            continue
        if name in MODEL_ARGUMENTS:
            raise EvalError(f"{name} = {value!r}: the hcx model does not have it: {MODEL_ARGUMENTS[name]}")
        if name not in known:
            raise EvalError(f"model argument {name} = {value!r}: {did_you_mean(name, known)}")
    if "pretrained" not in settings.model_args:
        raise EvalError("the hcx model needs --model_args pretrained=DIR, a model directory")
    if settings.gen_kwargs:
        sampling_params(settings.gen_kwargs, default_limit=1, seed=0)


@contextlib.contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Nothing printed or warned: lm-eval settles the same line again, and says it then."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def _prepare_run(args: Namespace, data: str | None, allow_code: bool) -> None:
    """Settles what lm-eval's `run` is given, once everything in it can be honoured."""
    import torch
    from lm_eval.config.evaluate_config import EvaluatorConfig

    with _silent("lm_eval.config.evaluate_config"):
        settings = EvaluatorConfig.from_cli(args)
        in_file = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    if settings.check_integrity:
        raise EvalError("--check_integrity runs tests that lm-eval's package does not hold; use hcx eval --check")
    model = settings.model or "hf"
    model_args = dict(settings.model_args or {})
    if model == "hcx":
        _refuse_for_hcx(settings)
        if settings.seed and settings.seed[2] is not None:
            model_args.setdefault("seed", settings.seed[2])
        args.model_args = model_args
        if args.device is None and "device" not in in_file:
            # lm-eval's default is a GPU, and its `hf` model takes the CPU where there is none.
            args.device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if not allow_code:
        refuse_foreign_code(_task_folders(settings.include_path, settings.tasks))
    for name in settings.tasks if isinstance(settings.tasks, list) else str(settings.tasks).split(","):
        card = task_cards().get(name) if isinstance(name, str) else None
        if card is not None and card.benchmark is not None and card.benchmark.judged is not None:
            raise EvalError(f"task {name!r} is scored by a judge: hcx eval MODEL --tasks {name} --out DIR runs it")
    own = str(tasks_directory())
    args.include_path = [settings.include_path, own] if settings.include_path else [own]
    if data is not None:
        args.metadata = {**(settings.metadata or {}), "data": data}


def _from_lm_eval(error: BaseException) -> bool:
    """Whether an error was raised by lm-eval's own code, which says what is wrong with a line by ValueError."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lm_eval.")


def _run(words: Sequence[str], data: str | None, refuse: Callable[[Namespace], None] | None = None) -> None:
    if not is_installed("lm_eval"):
        raise MissingExtra("lm-eval", "eval", "lm-eval's command line")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import hcx.evals.lm  # noqa: F401  (registers the model `hcx`)
    from hcx.model.convert.registration import register

    register()
    setup_logging()
    given = [word for word in words if word != ALLOW_CODE]
    allow_code = len(given) < len(words)
    folder = data_directory(data)
    # Its parser reads the process's arguments.
    sys.argv = ["lm_eval", *given]
    cli = HarnessCLI()
    args = cli.parse_args()
    try:
        if refuse is not None:
            refuse(args)
        if args.command == "run":
            _prepare_run(args, None if folder is None else str(folder), allow_code)
        elif hasattr(args, "include_path"):
            if not allow_code:
                refuse_foreign_code(_task_folders(args.include_path, None))
            args.include_path = [*([args.include_path] if args.include_path else []), str(tasks_directory())]
        with replaying(folder) if folder is not None and args.command == "run" else contextlib.nullcontext():
            cli.execute(args)
    except (ValueError, TypeError, OSError) as error:
        if not _from_lm_eval(error):
            raise
        raise EvalError(f"lm-eval: {error}") from error


def _refuse_unsafe(args: Namespace) -> None:
    if getattr(args, "confirm_run_unsafe_code", False):
        own = [name for name, card in task_cards().items() if card.is_ours and "sandbox" in card.metadata.needs]
        raise EvalError(
            "--confirm_run_unsafe_code: hcx eval runs programs that a model wrote in its sandbox only, and these tasks "
            f"need no such flag: {', '.join(card.name for card in find_tasks(own))}"
        )


def run_line(words: Sequence[str]) -> None:
    """`hcx eval` with lm-eval's flags.

    Args:
        words: the command line of lm-eval, to which `--data BUNDLE` and `--allow-code` may be added. Where a bundle or
            `HCX_EVAL_DATA` is named, data come from there and from nowhere else; otherwise lm-eval loads them as ever.

    Raises:
        MissingExtra: lm-eval is not installed.
        EvalError: a flag that cannot be honoured, with what to use instead; or what lm-eval says is wrong.
    """
    rest, data = split_line(words)
    _run(rest, data, _refuse_unsafe)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m hcx.lm_eval`: the same, and lm-eval's own flag for running programs outside a sandbox.

    Raises:
        MissingExtra: lm-eval is not installed.
        EvalError: as for `run_line`; a task folder holds code and `--allow-code` is not given.
    """
    _run(sys.argv[1:] if arguments is None else arguments, None)
