"""Which checkpoints stay, and which one is the last good one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from hcx.artifacts.durable import write_atomically
from hcx.artifacts.manifest import MANIFEST
from hcx.obs import get_logger

log = get_logger(__name__)

LAST_GOOD = "last-good.json"


def mark_last_good(checkpoint: Path, step: int) -> None:
    """Points at a finished checkpoint, atomically.

    Raises:
        OSError: the pointer cannot be written; it then still names the one before.
    """
    pointer = {"checkpoint": checkpoint.name, "step": step}
    write_atomically(checkpoint.parent / LAST_GOOD, (json.dumps(pointer) + "\n").encode())


def last_good(directory: str | Path) -> Path | None:
    """The checkpoint that the pointer names; None without a pointer. Whether it is whole is the reader's to say."""
    path = Path(directory) / LAST_GOOD
    try:
        pointer = json.loads(path.read_text(encoding="utf-8"))
        return path.parent / str(pointer["checkpoint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: cannot be read (%s); looking for the newest checkpoint instead", path, error)
        return None


def remove_old_checkpoints(found: Sequence[tuple[int, Path]], current: int, keep: int, keep_every: int = 0) -> None:
    """Removes checkpoints beyond the newest `keep`; the manifest goes first, so a half-removed one is never chosen.

    Args:
        found: (step, directory), oldest first.
        current: the step just saved. Later ones belong to another course of the run and are left alone.
        keep: how many of the newest stay; 0: all.
        keep_every: checkpoints at multiples of this step stay for good; 0: none.
    """
    if keep <= 0:
        return
    mine = [(step, path) for step, path in found if step <= current]
    pointed = last_good(mine[-1][1].parent) if mine else None
    for step, path in mine[:-keep]:
        if path == pointed or (keep_every and step and step % keep_every == 0):
            continue
        try:
            (path / MANIFEST).unlink()
            shutil.rmtree(path)
        except OSError as error:
            log.warning("%s: an old checkpoint cannot be removed (%s)", path, error.strerror)
