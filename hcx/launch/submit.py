"""Submitting a launch, once: two jobs that train one run would write over each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hcx.artifacts.durable import write_atomically
from hcx.errors import LaunchError
from hcx.launch.slurm import SlurmJob, SlurmLaunch

RECORD = "job.json"
"""In the directory of the launch: the numbers of the last submission."""


@dataclass(frozen=True)
class Submitted:
    """Numbers of the jobs.

    Attributes:
        train: of the training job.
        evaluation: of the one that waits for it, or None.
    """

    train: int
    evaluation: int | None


def sbatch_command(job: SlurmJob, after: int | str | None = None) -> list[str]:
    """The words that submit a batch file; `after`: only once that job has ended well."""
    options: list[str] = ["--parsable"]
    if after is not None:
        # Of arrays, each task waits for its own.
        kind = "aftercorr" if len(job.runs) > 1 or "--array=" in job.text else "afterok"
        options += [f"--dependency={kind}:{after}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", *options, str(job.script)]


def submit(launch: SlurmLaunch, say: Callable[[str], None]) -> Submitted:
    """Writes the files, submits, and records the numbers in `OUT/launch/job.json`.

    Args:
        launch: what `plan_launch` made.
        say: told what is done, line by line.

    Raises:
        LaunchError: SLURM is not there or refuses, or a job of an earlier launch still trains this run.
    """
    _refuse_a_second(launch)
    jobs = [job for job in (launch.train, launch.evaluation) if job is not None]
    for job in jobs:
        for path, text in [*job.files.items(), (job.script, job.text)]:
            _write(path, text)
            say(f"wrote {path}")
    train = _sbatch(sbatch_command(launch.train), say)
    record: dict[str, Any] = {"train": train, "submitted": datetime.now(UTC).isoformat(timespec="seconds")}
    _record(launch, record)
    evaluation = None
    if launch.evaluation is not None:
        evaluation = _sbatch(sbatch_command(launch.evaluation, train), say)
        _record(launch, record | {"evaluation": evaluation})
    return Submitted(train, evaluation)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written ({error.strerror}); choose another directory (out=DIR)") from None


def _record(launch: SlurmLaunch, record: dict[str, Any]) -> None:
    _write(launch.directory / RECORD, json.dumps(record, indent=1) + "\n")


def _refuse_a_second(launch: SlurmLaunch) -> None:
    # An array's run may also have been launched by itself, and the other way round.
    for directory in dict.fromkeys([launch.directory, *(run / "launch" for run in launch.train.runs)]):
        try:
            number = int(json.loads((directory / RECORD).read_text(encoding="utf-8"))["train"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        state = job_state(number)
        if state is not None:
            raise LaunchError(
                f"{directory.parent}: job {number} of an earlier launch trains this run already ({state}); wait for "
                f"it, end it (scancel {number}), or choose another directory (out=DIR)"
            )


def job_state(number: int) -> str | None:
    """The state of a job that waits or runs; None: it is over, or unknown to the controller.

    Raises:
        LaunchError: the controller does not answer.
    """
    done = _run(["squeue", "--noheader", f"--jobs={number}", "--format=%T"])
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return None
        raise LaunchError(f"squeue: {done.stderr.strip() or 'no answer'}; the controller must answer to launch a job")
    states = sorted(set(done.stdout.split()))
    return ", ".join(states) if states else None


def _sbatch(command: Sequence[str], say: Callable[[str], None]) -> int:
    say("$ " + " ".join(command))
    done = _run(command)
    if done.returncode:
        raise LaunchError(
            f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}\n"
            "the slurm section of the profile says what was asked for; sinfo and sacctmgr show what there is"
        )
    match = re.match(r"(\d+)", done.stdout.strip())
    if match is None:
        raise LaunchError(f"sbatch answered {done.stdout.strip()!r} instead of a job's number")
    return int(match.group(1))


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # A launch from inside a job asks for what its own file says, not for what that job has.
    kept = ("SLURM_CONF", "SLURM_TIME_FORMAT")
    inherited = ("SLURM_", "SBATCH_", "SRUN_")
    env = {name: value for name, value in os.environ.items() if name in kept or not name.startswith(inherited)}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]}: not found; run this where SLURM's commands are (a login node), or see the files by "
            "--dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]}: no answer within 120 s; is the controller up (scontrol ping)?") from None
