"""The training loop, its objectives and callbacks, and checkpoints in one layout for all engines."""

from hcx.train.checkpoint import CheckpointReader, latest_checkpoint, save_checkpoint
from hcx.train.objectives import SFT, NextToken, build_objective
from hcx.train.trainer import Trainer, TrainerConfig, TrainResult

__all__ = [
    "SFT",
    "CheckpointReader",
    "NextToken",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "build_objective",
    "latest_checkpoint",
    "save_checkpoint",
]
