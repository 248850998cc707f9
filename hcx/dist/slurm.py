"""What SLURM tells a task about its place: rank, nodes, and an address and a port that all tasks derive alike.

Free of torch. Names of the variables: sbatch(1) and srun(1), "OUTPUT ENVIRONMENT VARIABLES".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from hcx.errors import LaunchError

PORT_BASE, PORT_COUNT = 20000, 12000
"""Ports of the rendezvous: below 32768, where Linux begins to hand ports out to clients."""
RESTART_STRIDE = 7919
"""A prime: a restart takes a port far from that of the attempt before, which may not have let go of it yet."""
MAX_NODES = 100_000


def in_step(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several tasks that `srun` started.

    The shell of a batch job has SLURM_PROCID and SLURM_NTASKS too, but no SLURM_STEP_ID: it is no task, and what it
    starts directly is one process.
    """
    return "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _tasks(env) > 1


def place(env: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, world size, local rank) of a task."""
    return _number(env, "SLURM_PROCID"), _tasks(env), _number(env, "SLURM_LOCALID")


def rendezvous_address(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """(host, port) at which rank 0 is met; MASTER_ADDR and MASTER_PORT, where they are set, come first."""
    host = env.get("MASTER_ADDR") or first_node(env)
    port = env.get("MASTER_PORT")
    if port is None:
        return host, port_of_job(_number(env, "SLURM_JOB_ID"), int(env.get("SLURM_RESTART_COUNT", "0") or 0))
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise LaunchError(f"MASTER_PORT = {port!r}: must be a port number, 1 to 65535; unset it to derive one")
    return host, int(port)


def port_of_job(job: int, restart: int = 0) -> int:
    """The port of a job's rendezvous: jobs that share a node have different numbers, and so, nearly always, ports."""
    return PORT_BASE + (job + RESTART_STRIDE * restart) % PORT_COUNT


def first_node(env: Mapping[str, str] = os.environ) -> str:
    """The node of rank 0."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if env.get(name):
            return expand_nodelist(env[name], name)[0]
    raise LaunchError(
        "SLURM_STEP_NODELIST is not set, though srun started this task; pass the environment on (srun --export=ALL), "
        "or set MASTER_ADDR to the node of rank 0"
    )


def expand_nodelist(text: str, source: str = "node list") -> list[str]:
    """Host names of a SLURM node list, in its order: `gpu[01-03,7],login` -> gpu01 gpu02 gpu03 gpu7 login.

    Several brackets in one name multiply (`r[1-2]n[1-2]`), the last one running fastest, as in `scontrol show
    hostnames`.

    Raises:
        LaunchError: it is not a node list; `source` says where it came from.
    """
    names: list[str] = []
    for part in _split(text, source):
        names += _expand(part, text, source)
        if len(names) > MAX_NODES:
            raise LaunchError(f"{source} = {text!r}: more than {MAX_NODES} nodes")
    if not names:
        raise LaunchError(f"{source} = {text!r}: names no node")
    return names


def _split(text: str, source: str) -> Iterator[str]:
    """At commas outside brackets."""
    depth, start = 0, 0
    for position, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            break
        if letter == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    if depth:
        raise LaunchError(f"{source} = {text!r}: brackets do not match; expected a list like node[01-04,7],other")
    yield text[start:]


_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9._-]*", re.ASCII)


def _expand(part: str, text: str, source: str) -> list[str]:
    pieces = re.split(r"\[([^\]]*)\]", part)  # name, ranges, name, ranges, ..., name
    names = [""]
    for position, piece in enumerate(pieces):
        if position % 2 == 0:
            if not _NAME.fullmatch(piece):
                raise LaunchError(f"{source} = {text!r}: {piece!r} is no host name")
            choices = [piece]
        else:
            choices = _numbers(piece, text, source)
        if len(names) * len(choices) > MAX_NODES:
            raise LaunchError(f"{source} = {text!r}: more than {MAX_NODES} nodes")
        names = [name + choice for name in names for choice in choices]
    if names[0] == "":
        raise LaunchError(f"{source} = {text!r}: an empty host name; expected a list like node[01-04,7],other")
    return names


def _numbers(ranges: str, text: str, source: str) -> list[str]:
    found: list[str] = []
    for item in ranges.split(","):
        match = _RANGE.fullmatch(item)
        if match is None:
            raise LaunchError(f"{source} = {text!r}: [{ranges}] is no list of numbers and ranges, such as [01-04,7]")
        low, high = match.group(1), match.group(2) or match.group(1)
        if not int(low) <= int(high) <= int(low) + MAX_NODES:
            raise LaunchError(f"{source} = {text!r}: the range {item} runs backwards, or is too long")
        # Leading zeros are part of the name.
        found += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return found


def _tasks(env: Mapping[str, str]) -> int:
    # Of the step: a job may have more tasks than this srun was asked for.
    return _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", 1)


def _number(env: Mapping[str, str], name: str, default: int = 0) -> int:
    value = env.get(name, str(default))
    if not value.isascii() or not value.isdigit():
        raise LaunchError(f"{name} = {value!r}: SLURM sets it to a whole number; start tasks by srun")
    return int(value)
