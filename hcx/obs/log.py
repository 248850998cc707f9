"""Library code logs through `logging`, with the rank; only the command line prints."""

from __future__ import annotations

import logging
import os
import sys


def _rank() -> str:
    """Of torchrun, or of a task that srun started (see `hcx.dist.slurm.in_step`)."""
    env = os.environ
    return env.get("RANK", env.get("SLURM_PROCID", "0") if "SLURM_STEP_ID" in env else "0")


class _RankFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = _rank()
        return True


def setup_logging(level: str | int = "INFO") -> None:
    """Sends hcx's logs to standard error; ranks other than 0 only from WARNING up."""
    logger = logging.getLogger("hcx")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s rank %(rank)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    handler.addFilter(_RankFilter())
    logger.addHandler(handler)
    logger.setLevel(level if _rank() == "0" else logging.WARNING)
    logger.propagate = False


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (`get_logger(__name__)`)."""
    return logging.getLogger(name)
