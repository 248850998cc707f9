"""The training loop, its objectives and callbacks, and checkpoints in one layout for all engines."""

from hcx.train.checkpoint import CheckpointReader, latest_checkpoint, save_checkpoint
from hcx.train.objectives import NextToken
from hcx.train.trainer import Trainer, TrainerConfig, TrainResult

__all__ = [
    "CheckpointReader",
    "NextToken",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "latest_checkpoint",
    "save_checkpoint",
]
