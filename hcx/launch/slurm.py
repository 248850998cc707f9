"""A training recipe as SLURM jobs: batch files from the templates in `slurm/`, and an evaluation behind them.

What a job computes is fixed when it is submitted: the resolved recipe is written beside the batch file, and every
requeue of the job reads that one, whatever becomes of the file it came from.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcx.artifacts import find_resource
from hcx.config import dump_yaml
from hcx.errors import ConfigError
from hcx.evals.run import choose
from hcx.launch.slurm_config import ApptainerConfig, PyxisConfig, SlurmConfig, directive_value, one_line
from hcx.recipe import check_recipe, load_train_recipe
from hcx.recipe.train import TrainRecipe

LAUNCH = "launch"
"""Directory, in that of the run, of what a job reads."""
TEMPLATES = "slurm"
_IN_A_PATH = re.compile(r"[\w.-]+")


class Shell(str):
    """Text that may stand in a batch file: quoted, a number, or checked. Templates print nothing else."""


def quoted(word: object) -> Shell:
    """One word of shell, whatever it holds.

    Raises:
        ConfigError: it holds a line break or another control character: quoted it would be harmless, but a batch file
            whose lines are not what they seem is no file to trust.
    """
    try:
        return Shell(shlex.quote(one_line(str(word))))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def words(*parts: object) -> Shell:
    """Several words of shell."""
    return Shell(" ".join(quoted(part) for part in parts))


@dataclass(frozen=True)
class SlurmJob:
    """A batch file that is not written yet.

    Attributes:
        script: where it goes.
        text: its content.
        files: what it reads, by path.
        runs: the runs that it trains: one, or one for each task of an array.
    """

    script: Path
    text: str
    files: Mapping[Path, str]
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class SlurmLaunch:
    """What a launch consists of.

    Attributes:
        train: the training job.
        evaluation: a job that waits for it to end well, or None.
        directory: of the launch.
        world_size: processes.
    """

    train: SlurmJob
    evaluation: SlurmJob | None
    directory: Path
    world_size: int


@dataclass(frozen=True)
class Array:
    """One task of a job array for each value of a recipe's key.

    Attributes:
        key: dotted path in the recipe.
        values: as written; each also names the run's directory, `OUT/KEY-VALUE`.
    """

    key: str
    values: tuple[str, ...]


def parse_array(text: str) -> Array:
    """`optim.lr=1e-3,3e-3` as an array.

    Raises:
        ConfigError: it is written in another way, or a value cannot name a directory.
    """
    key, equals, listed = text.partition("=")
    values = tuple(listed.split(","))
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key, re.ASCII) or not all(values):
        raise ConfigError(f"--array {text!r}: write key=value,value,..., for example --array seed=0,1,2")
    for value in values:
        if not _IN_A_PATH.fullmatch(value) or value.strip(".") == "":
            raise ConfigError(f"--array {text!r}: {value!r} names a directory too: letters, digits, . _ - only")
    if len(set(values)) < len(values):
        raise ConfigError(f"--array {text!r}: a value comes twice, and its runs would share a directory")
    if key in ("out", "name"):
        raise ConfigError(f"--array {text!r}: {key} comes of the values; vary what the runs compute")
    return Array(key, values)


def plan_launch(
    recipe_file: str | Path,
    overrides: Sequence[str],
    nodes: int,
    config: SlurmConfig,
    *,
    array: Array | None = None,
    suite: str | None = None,
    directory: Path | None = None,
) -> SlurmLaunch:
    """Checks everything that can be checked here, and makes the batch files.

    Args:
        recipe_file: of the training run.
        overrides: `key=value` for it.
        nodes: to ask for.
        config: of the cluster.
        array: train once for each of these values.
        suite: evaluate the model by this suite afterwards.
        directory: where the job runs, and what relative paths start from; the current one if not given.

    Raises:
        HcxError: the recipe cannot run on so many processes, or a value cannot stand in a batch file.
    """
    if nodes < 1:
        raise ConfigError(f"--nodes {nodes}: must be at least 1")
    directory = (directory or Path.cwd()).absolute()
    world_size = nodes * config.tasks
    base = load_train_recipe(recipe_file, overrides)
    recipes = [base] if array is None else [_variant(recipe_file, overrides, base, array, v) for v in array.values]
    for recipe in recipes:
        try:
            check_recipe(recipe, world_size)
        except ConfigError as error:
            raise ConfigError(
                f"{error}\n({nodes} nodes x {config.tasks} processes = {world_size}; slurm.tasks_per_node of the "
                "profile, --nodes and the recipe's engine section decide)"
            ) from None
    if suite is not None:
        choose(None, suite, None, None)
    out = directory / base.out
    runs = tuple(directory / recipe.out for recipe in recipes)
    _path(out, "out")
    _check_setup(config)
    launch = out / LAUNCH
    names = [f"recipe-{number}.yaml" for number in range(len(runs))] if array else ["recipe.yaml"]
    values = _values(base, runs if array else (), out, launch, config, directory)
    train = SlurmJob(
        launch / "train.sbatch",
        _render(
            "train.sbatch",
            **values,
            directives=_train_directives(base.name, nodes, config, directory, out, len(runs) if array else 0),
            script=quoted(launch / "train.sbatch"),
            srun=_srun(config, Shell("--ntasks-per-node=" + str(config.tasks)), directory, runs),
            max_starts=Shell(str(config.max_starts_without_progress)),
            rendezvous_s=Shell(str(config.rendezvous_s)),
        ),
        {launch / name: dump_yaml(recipe) for name, recipe in zip(names, recipes, strict=True)},
        runs,
    )
    evaluation = None
    if suite is not None:
        evaluation = SlurmJob(
            launch / "eval.sbatch",
            _render(
                "eval.sbatch",
                **values,
                directives=_eval_directives(base.name, config, directory, out, len(runs) if array else 0),
                srun=_srun(config, Shell("--ntasks=1"), directory, runs),
                suite=quoted(suite),
                device=words("--device", "cuda" if config.gpus_per_node else "cpu"),
            ),
            {},
            runs,
        )
    return SlurmLaunch(train, evaluation, launch, world_size)


def _variant(file: str | Path, overrides: Sequence[str], base: TrainRecipe, array: Array, value: str) -> TrainRecipe:
    name = f"{array.key}-{value}"
    own = [f"{array.key}={value}", f"out={dump_word(str(Path(base.out) / name))}"]
    return load_train_recipe(file, [*overrides, *own])


def dump_word(text: str) -> str:
    """Text as a YAML scalar that reads back as that text."""
    return "'" + text.replace("'", "''") + "'"


def _values(
    recipe: TrainRecipe, runs: Sequence[Path], out: Path, launch: Path, config: SlurmConfig, directory: Path
) -> dict[str, Any]:
    return {
        "title": Shell(_job_name(recipe.name)),
        "runs": [quoted(run) for run in runs],
        "run": quoted(out),
        "launch": quoted(launch),
        "modules": [quoted(module) for module in config.modules],
        "setup": [Shell(line) for line in config.setup],
        "threads": Shell(str(config.cpus_per_task)),
        "environment": [(Shell(name), _literal(name, value)) for name, value in config.environment.items()],
        "hcx": _hcx(config, directory, runs or [out]),
    }


def _literal(name: str, value: str) -> Shell:
    try:
        return quoted(value)
    except ConfigError as error:
        raise ConfigError(f"slurm.environment.{name} = {error}") from None


def _job_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-")[:64] or "hcx"


def _train_directives(
    name: str, nodes: int, config: SlurmConfig, directory: Path, out: Path, tasks: int
) -> list[Shell]:
    lines = [
        f"--job-name={_job_name(name)}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={config.tasks}",
        *_common(config, directory),
        *_gpus(config, config.gpus_per_node or 0),
        *(["--exclusive"] if config.exclusive else []),
        *([f"--array=0-{tasks - 1}"] if tasks else []),
        f"--signal=USR1@{config.signal_s}",
        f"--output={_log(out, 'train', tasks)}",
        *config.sbatch_options,
    ]
    return [Shell(line) for line in lines]


def _eval_directives(name: str, config: SlurmConfig, directory: Path, out: Path, tasks: int) -> list[Shell]:
    lines = [
        f"--job-name={_job_name(name)}-eval",
        "--nodes=1",
        "--ntasks=1",
        *_common(config, directory),
        *_gpus(config, min(1, config.gpus_per_node or 0)),
        *([f"--array=0-{tasks - 1}"] if tasks else []),
        f"--output={_log(out, 'eval', tasks)}",
        *config.sbatch_options,
    ]
    return [Shell(line) for line in lines]


def _common(config: SlurmConfig, directory: Path) -> list[str]:
    given = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "reservation": config.reservation,
        "time": config.time,
        "deadline": config.deadline,
        "mem": config.mem,
        "cpus-per-task": config.cpus_per_task,
        "chdir": _path(directory, "the working directory"),
    }
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def _gpus(config: SlurmConfig, count: int) -> list[str]:
    if not count:
        return []
    return [f"--gres=gpu:{count}" if config.gpu_request == "gres" else f"--gpus-per-node={count}"]


def _log(out: Path, kind: str, tasks: int) -> str:
    number = "%A_%a" if tasks else "%j"
    return f"{_path(out, 'out').replace('%', '%%')}/slurm-{kind}-{number}.out"


def _path(path: Path, what: str) -> str:
    try:
        return directive_value(str(path))
    except ValueError as error:
        raise ConfigError(f"{what} = {str(path)!r}: {error}; choose another directory") from None


def _srun(config: SlurmConfig, tasks: Shell, directory: Path, runs: Sequence[Path]) -> Shell:
    # Ranks that lose a peer end by themselves, with the right code; --wait ends those that hang.
    options: list[object] = ["--kill-on-bad-exit=0", f"--wait={config.straggler_s}", "--unbuffered"]
    options.append(f"--cpus-per-task={config.cpus_per_task}")  # srun does not take it from sbatch since 22.05
    if isinstance(config.container, PyxisConfig):
        mounts = [*_own(directory, runs), *config.container.mounts]
        options += [
            f"--container-image={config.container.image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={directory}",
        ]
    return Shell(f"srun {tasks} {words(*options, *config.srun_options)}")


def _hcx(config: SlurmConfig, directory: Path, runs: Sequence[Path]) -> Shell:
    inside = config.container is not None
    command = config.command or (("hcx",) if inside else (sys.executable, "-m", "hcx.cli.main"))
    container = config.container
    if not isinstance(container, ApptainerConfig):
        return words(*command)
    prefix = ["apptainer", "exec", *(["--nv"] if config.gpus_per_node else []), "--pwd", str(directory)]
    for bind in [*_own(directory, runs), *container.binds]:
        prefix += ["--bind", bind]
    return words(*prefix, *container.options, container.image, *command)


def _own(directory: Path, runs: Sequence[Path]) -> list[str]:
    """What a job reads and writes, under the same names inside a container."""
    outside = [run for run in runs if not run.is_relative_to(directory)]
    return [f"{path}:{path}" for path in dict.fromkeys([directory, *outside])]


def _render(template: str, **values: Any) -> str:
    import jinja2

    def safe(value: object) -> object:
        if not isinstance(value, Shell):
            raise TypeError(f"{template} prints {value!r}, which was not made safe for a batch file")
        return value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(find_resource(TEMPLATES)),
        undefined=jinja2.StrictUndefined,
        finalize=safe,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # it is shell, and quoted
    )
    return environment.get_template(template).render(**values)


def _check_setup(config: SlurmConfig) -> None:
    """Bash reads the site's lines without running them: one with an open quote would swallow the rest of the file."""
    text = "\n".join(config.setup)
    try:
        checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return  # no bash where nothing is submitted from, as in a dry run elsewhere
    if checked.returncode:
        raise ConfigError(f"slurm.setup of the profile: bash cannot read it: {checked.stderr.strip()}")
