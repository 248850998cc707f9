"""The `slurm:` part of a cluster profile: what a site's batch files need, and which of it is safe to write into one.

A batch file is two languages: `#SBATCH` lines, which no shell reads and which know no quoting worth the name, and
shell. So values for the first are limited to letters that mean nothing to either; values for the second are quoted.
Lines of `setup` are the site's own shell code, written as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from hcx.artifacts import find_file
from hcx.config import Config, decode, resolve_extends
from hcx.errors import ConfigError

PROFILES = "slurm/profiles"
DIRECTIVE = re.compile(r"[\w.,:=@/+%&|*()\[\]-]+")
"""What the value of an `#SBATCH` line may hold: no space, quote, backslash, `#`, `$` or line break."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d){0,2}", re.ASCII)
_DEADLINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d)?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class ApptainerConfig(Config):
    """Tasks run in an image by Apptainer (or Singularity, which answers to the same name)."""

    kind: Literal["apptainer"] = "apptainer"
    """Runs `apptainer exec IMAGE hcx ...` on each node."""
    image: str
    """A .sif file or a URI that Apptainer knows."""
    binds: tuple[str, ...] = ()
    """`HOST:CONTAINER` directories; the working directory and the run's are always there under their own names."""
    options: tuple[str, ...] = ()
    """More words for `apptainer exec`, such as `--cleanenv`; `--nv` comes by itself with GPUs."""


class PyxisConfig(Config):
    """Tasks run in an image by srun's pyxis plugin (enroot)."""

    kind: Literal["pyxis"] = "pyxis"
    """Runs `srun --container-image=IMAGE ...`."""
    image: str
    """A .sqsh file, or registry#image:tag."""
    mounts: tuple[str, ...] = ()
    """`HOST:CONTAINER` directories; the working directory and the run's are always there under their own names."""


ContainerConfig = Annotated[ApptainerConfig | PyxisConfig, Field(discriminator="kind")]


class SlurmConfig(Config):
    """How jobs are asked for, set up and started on a cluster."""

    partition: str
    """Where jobs run (`sinfo` lists them)."""
    time: str
    """Time limit of one start of the job, as sbatch reads it (`24:00:00`, `2-00`, minutes): a run of any length goes
    on by requeueing."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    reservation: str | None = None
    """A reservation to run in."""
    gpus_per_node: int | None = None
    """GPUs that a job takes of each node; the profile's `gpus_per_node` if not given. 0: none are asked for."""
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How GPUs are asked for: older sites know `--gres=gpu:N` only."""
    tasks_per_node: int | None = None
    """Processes on each node; one per GPU if not given, one without GPUs."""
    cpus_per_task: int = 1
    """CPU cores of each process; also its threads (OMP_NUM_THREADS)."""
    mem: str | None = "0"
    """Memory of each node, as sbatch reads it; 0: all of it, null: the site's default."""
    exclusive: bool = False
    """No other job on the nodes."""
    deadline: str | None = None
    """`YYYY-MM-DDTHH:MM[:SS]`: the job, requeued or not, ends by then."""
    signal_s: int = 300
    """Seconds before the time limit at which ranks get SIGUSR1 and save: more than the longest step and a save."""
    straggler_s: int = 60
    """Seconds that ranks may go on after the first one ended; then srun ends them."""
    rendezvous_s: int = 300
    """Seconds for all ranks to find each other at the start."""
    max_starts_without_progress: int = 3
    """Starts in a row that may end without a new checkpoint; then the job is not requeued any more."""
    modules: tuple[str, ...] = ()
    """For `module load`, in order."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of every process, such as NCCL_SOCKET_IFNAME; values are taken literally."""
    setup: tuple[str, ...] = ()
    """Lines of shell, as they are, run on the first node before the ranks start: `source /opt/hcx/bin/activate`."""
    container: ContainerConfig | None = None
    """Run the ranks in a container; the plain environment if not given."""
    command: tuple[str, ...] | None = None
    """How a task calls hcx; the Python that submits if not given, `hcx` in a container."""
    sbatch_options: tuple[str, ...] = ()
    """More `#SBATCH` lines, such as `--mail-type=FAIL`."""
    srun_options: tuple[str, ...] = ()
    """More words for srun, such as `--mpi=none`."""

    @field_validator("partition", "account", "qos", "constraint", "reservation", "mem")
    @classmethod
    def _directive(cls, value: str | None) -> str | None:
        if value is not None:
            directive_value(value)
        return value

    @field_validator("time")
    @classmethod
    def _time(cls, value: str) -> str:
        if not _TIME.fullmatch(value):
            raise ValueError("must be a time limit such as 24:00:00, 2-00:00:00 or minutes")
        return value

    @field_validator("deadline")
    @classmethod
    def _deadline(cls, value: str | None) -> str | None:
        if value is not None and not _DEADLINE.fullmatch(value):
            raise ValueError("must be written YYYY-MM-DDTHH:MM[:SS]")
        return value

    @field_validator("sbatch_options")
    @classmethod
    def _options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            directive_value(option)
            if not option.startswith("--"):
                raise ValueError(f"{option!r} must be written --name or --name=value")
        return value

    @field_validator("environment")
    @classmethod
    def _variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable (letters, digits and _)")
        return value

    @field_validator("modules", "setup", "srun_options", "command")
    @classmethod
    def _lines(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for line in value or ():
            one_line(line)
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, least in (("gpus_per_node", 0), ("tasks_per_node", 1)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise ValueError(f"{name} = {given}: must be at least {least}")
        for name, least in (
            ("cpus_per_task", 1),
            ("signal_s", 1),
            ("straggler_s", 1),
            ("rendezvous_s", 1),
            ("max_starts_without_progress", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.signal_s > 65535:
            raise ValueError(f"signal_s = {self.signal_s}: sbatch takes at most 65535")
        if self.command == ():
            raise ValueError("command is empty: name a program, or leave it out")
        return self

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1


def directive_value(value: str) -> str:
    """A value that may stand in an `#SBATCH` line.

    Raises:
        ValueError: it holds something that could end the value or the line.
    """
    if not DIRECTIVE.fullmatch(value):
        raise ValueError("only letters, digits and . , : = @ / + % & | * ( ) [ ] _ - may stand in an #SBATCH line")
    return value


def one_line(value: str) -> str:
    """A value without control characters: it stays on its line of the batch file.

    Raises:
        ValueError: it has some.
    """
    if _CONTROL.search(value):
        raise ValueError(f"{value!r}: line breaks and control characters do not belong here")
    return value


def load_slurm_profile(name: str) -> SlurmConfig:
    """The `slurm:` part of a profile: a path, or the name of a shipped one (`local` is `slurm/profiles/local.yaml`).

    Raises:
        HcxError: no such profile; the shipped ones are listed.
        ConfigError: it has no `slurm:` part, or that lacks fields or has wrong ones.
    """
    path = find_file(_file_of(name), PROFILES)
    values = resolve_extends(path)
    section: Any = values.get("slurm")
    if section is None:
        raise ConfigError(
            f"{path}: slurm: required, but not given; `hcx launch slurm` needs at least slurm.partition and slurm.time"
        )
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: slurm = {section!r}: must be a mapping of keys")
    if "gpus_per_node" not in section and isinstance(values.get("gpus_per_node"), int):
        section = {**section, "gpus_per_node": values["gpus_per_node"]}
    return decode(_Profile, {"slurm": section}, str(path)).slurm


class _Profile(Config):
    """For errors that name keys from the top of the file."""

    slurm: SlurmConfig
    """The part that this module owns."""


def _file_of(name: str) -> str:
    plain = re.fullmatch(r"[\w-]+", name) is not None and not Path(name).is_file()
    return f"{PROFILES}/{name}.yaml" if plain else name
