"""Starts the processes of one run on this machine, as torchrun would, when nobody else started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE_SECONDS = 30.0
"""How long the other ranks may take to end after one failed."""


_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a new process: the kernel kills it when its launcher is killed, so that no orphan goes on writing (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_local_ranks(command: Sequence[str], world_size: int) -> int:
    """Runs `command` once per rank with RANK, WORLD_SIZE and the rendezvous set; only rank 0 prints to standard output.

    SIGTERM, SIGINT and SIGUSR1 are passed on, so that every rank can save; a killed launcher takes its ranks with it.

    Returns:
        See `outcome`.
    """
    port = free_port()
    threads = max(1, (os.cpu_count() or 1) // world_size)
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(world_size):
        environment = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        quiet = None if rank == 0 else subprocess.DEVNULL
        ranks.append(
            subprocess.Popen(
                list(command), env=environment, stdout=quiet, start_new_session=True, preexec_fn=die_with_parent
            )
        )

    def forward(number: int, _frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        return _wait(ranks)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    failed_at: float | None = None
    while any(process.poll() is None for process in ranks):
        if failed_at is None and any(process.poll() not in (None, 0) for process in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            break
        time.sleep(0.05)
    return outcome([process.poll() or 0 for process in ranks])


def outcome(codes: Sequence[int]) -> int:
    """One exit code for a run, from those of its ranks (negative: ended by that signal).

    0 if every rank ended so. A mistake (1) or something of the user's (2) counts before 75 (resumable), which is what
    ranks end with that only lost the others. Where signals alone ended ranks, the run is resumable, unless one is a
    crash of the process itself (SIGSEGV, SIGABRT, ...).
    """
    told = [code for code in codes if code > 0]
    if told:
        return min(told)
    ended = {-code for code in codes if code < 0}
    if not ended:
        return 0
    return os.EX_TEMPFAIL if ended <= {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} else 1


def this_command() -> list[str]:
    """The command line of this process, to run again."""
    return [sys.executable, "-m", "hcx.cli.main", *sys.argv[1:]]
