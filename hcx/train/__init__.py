"""The training loop, its objectives and callbacks, and checkpoints in one layout for all engines."""

from hcx.train.checkpoint import CheckpointReader, find_checkpoint, latest_checkpoint, open_checkpoint
from hcx.train.config import TrainerConfig
from hcx.train.ledger import read_ledger
from hcx.train.objectives import SFT, NextToken, build_objective
from hcx.train.resilience import ResilienceConfig
from hcx.train.saving import CheckpointSaver, save_checkpoint
from hcx.train.stages import StageConfig, StagedLoader, plan_stages
from hcx.train.trainer import Trainer, TrainResult

__all__ = [
    "SFT",
    "CheckpointReader",
    "CheckpointSaver",
    "NextToken",
    "ResilienceConfig",
    "StageConfig",
    "StagedLoader",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "build_objective",
    "find_checkpoint",
    "latest_checkpoint",
    "open_checkpoint",
    "plan_stages",
    "read_ledger",
    "save_checkpoint",
]
