"""How the end of one rank becomes the end of all, with one reason and one exit code.

A rank that fails leaves a note before it goes; a rank whose peer is gone looks for one. With a note it ends as the rank
that wrote it: a mistake stays a mistake, and nobody starts the run again for it. Without one, the peer was killed or
its node is lost, and the run is resumable (exit code 75).
"""

from __future__ import annotations

import re
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hcx.artifacts.manifest import write_atomically
from hcx.dist.rendezvous import attempt_token
from hcx.errors import HcxError, PeerLost, TrainingError
from hcx.obs import get_logger

log = get_logger(__name__)

FAILURES = "failures"
"""Directory of the notes, in that of the run. The first line of each is `exit N`: batch files read it."""
NOTE_S = 3.0
"""How long a note may take to be seen: shared disks are slow to tell other nodes of new files."""
POLL_S = 0.05
# What gloo and NCCL say when the other side is gone (torch raises plain RuntimeError for gloo's).
_GLOO = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
# CUDA's words for faults of the device (cudaErrorECCUncorrectable, NvlinkUncorrectable, HardwareStackError, ...).
_DEVICE = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "hardware stack error",
    "device(s) is/are busy or unavailable",
    "GPU is lost",
)


def is_device_fault(error: BaseException) -> bool:
    """Whether an accelerator of this node failed: no mistake of anybody's, and another node may do."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or silent."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GLOO)


class OtherRankFailed(TrainingError):
    """Another rank ended with an error that is the user's to mend; its own log has the whole of it."""


class OtherRankCrashed(RuntimeError):
    """Another rank met a mistake of ours; its own log has the traceback."""


@contextmanager
def one_ending(directory: str | Path, rank: int, world_size: int) -> Iterator[None]:
    """Inside, an error of this rank is noted for the others, and the loss of another rank is told by its cause.

    Args:
        directory: of the run, shared by all ranks.
        rank: of this process.
        world_size: with one process nothing is changed.

    Raises:
        PeerLost: another rank is gone without a word, or the accelerator of this one failed.
        OtherRankFailed: it left a note with exit code 2.
        OtherRankCrashed: it left a note with exit code 1.
    """
    try:
        yield
    except Exception as error:
        if is_device_fault(error):
            raise PeerLost(
                f"rank {rank} on {socket.gethostname()}: its accelerator failed ({_short(error)}). The run is "
                "resumable; if the node does it again, keep jobs away from it (sbatch --exclude) and have it looked at"
            ) from error
        if world_size == 1:
            raise
        if isinstance(error, PeerLost | OtherRankFailed | OtherRankCrashed):
            raise
        if not is_lost_peer(error):
            _leave_note(Path(directory), rank, error)
            raise
        first = _short(error)
        log.warning("a collective failed on %s: %s", socket.gethostname(), first)
        cause = _told(Path(directory), rank, first)
        raise cause from error


def _short(error: BaseException) -> str:
    """Without the source line of the library and its guesses."""
    line = re.sub(r"^\[\S*\] ", "", str(error)).split("\n")[0].split(". This is")[0]
    return line or type(error).__name__


def _leave_note(directory: Path, rank: int, error: Exception) -> None:
    code = 2 if isinstance(error, HcxError) else 1
    text = str(error) if isinstance(error, HcxError) else "".join(traceback.format_exception(error))
    head = f"exit {code}\nattempt {attempt_token()}\nrank {rank} on {socket.gethostname()}\n\n"
    try:
        (directory / FAILURES).mkdir(parents=True, exist_ok=True)
        write_atomically(directory / FAILURES / f"rank-{rank:05d}.txt", (head + text.strip() + "\n").encode())
    except OSError as problem:
        log.error("the other ranks cannot be told of the error: %s", problem)


def read_note(path: Path) -> Mapping[str, Any] | None:
    """A note's `code`, `attempt`, `where` and `message`; None if it is no note."""
    try:
        code, attempt, where, _, *message = path.read_text(encoding="utf-8").split("\n")
        return {
            "code": int(code.removeprefix("exit ")),
            "attempt": attempt.removeprefix("attempt "),
            "where": where,
            "message": "\n".join(message).strip(),
        }
    except (OSError, ValueError):
        return None


def _told(directory: Path, rank: int, first: str) -> Exception:
    deadline = time.monotonic() + NOTE_S
    while True:
        for path in sorted((directory / FAILURES).glob("rank-*.txt")):
            note = read_note(path)
            if note is None or note["attempt"] != attempt_token():
                continue  # of an earlier start
            message = f"{note['where']} ended the run: {note['message'].splitlines()[-1]} (all of it: {path})"
            return OtherRankFailed(message) if note["code"] == 2 else OtherRankCrashed(message)
        if time.monotonic() > deadline:
            return PeerLost(
                f"rank {rank} on {socket.gethostname()}: another rank is gone without a word ({first}); it was killed, "
                "or its node is lost. Run again to resume from the last good checkpoint"
            )
        time.sleep(POLL_S)
