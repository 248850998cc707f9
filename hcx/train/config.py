"""What a recipe says about the run itself."""

from __future__ import annotations

from typing import Literal

from hcx.config import Config
from hcx.train.resilience import ResilienceConfig
from hcx.train.stages import StageConfig


class TrainerConfig(Config):
    """Length of a run, batch, validation, checkpoints, and what happens when something goes wrong."""

    steps: int
    """Optimizer steps of the whole run."""
    global_batch: int
    """Rows (samples of `seq_len` tokens) per optimizer step, over all replicas; with `data.kind: chat`, tokens."""
    micro_batch: int
    """Rows per forward; with `data.kind: chat`, tokens at most, filling included."""
    stages: tuple[StageConfig, ...] = ()
    """Parts of the run at other sequence lengths, with as many tokens per step; none: `data.seq_len` throughout."""
    validate_every: int = 100
    """Steps between validations; 0: at the end only."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: at the end only."""
    checkpoint_async: bool = True
    """Write checkpoints on a thread, from a copy of the state in CPU memory; else steps wait for the disk."""
    checkpoint_errors: Literal["warn", "stop"] = "warn"
    """When a checkpoint cannot be written: go on with the last good one and warn, or end the run. The last checkpoint
    of a run must be written either way."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good, beside the newest; 0: none."""
    max_minutes: float | None = None
    """Save and stop as resumable after this time."""
    max_skipped_steps: int = 20
    """Bad steps in a row (see `resilience`) after which the run stops."""
    resilience: ResilienceConfig = ResilienceConfig()
    """What happens at a step whose loss or gradient is not finite, or a spike."""
    watchdog_s: float = 1800.0
    """Seconds without progress after which a rank's stacks are written, and twice this after which the run ends;
    0: no watchdog."""
