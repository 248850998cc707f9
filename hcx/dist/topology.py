"""Which part of the work this process does."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed

from hcx.dist import rendezvous, slurm
from hcx.errors import LaunchError


@dataclass(frozen=True)
class Topology:
    """The position of one process in the grid of parallel axes.

    Ranks count along tensor parallelism first, then data parallelism, then pipeline stages (megatron-core's order).
    """

    rank: int = 0
    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size % (self.tp_size * self.pp_size):
            raise LaunchError(
                f"{self.world_size} processes cannot be split into tensor parallel {self.tp_size} x "
                f"pipeline {self.pp_size}; start a multiple of {self.tp_size * self.pp_size} processes"
            )

    @property
    def dp_size(self) -> int:
        """Model replicas."""
        return self.world_size // (self.tp_size * self.pp_size)

    @property
    def tp_rank(self) -> int:
        """Position along tensor parallelism."""
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        """Which replica."""
        return (self.rank // self.tp_size) % self.dp_size

    @property
    def pp_rank(self) -> int:
        """Which pipeline stage."""
        return self.rank // (self.tp_size * self.dp_size)

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the final norm and the output."""
        return self.pp_rank == self.pp_size - 1


def process_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's or srun's variables; (0, 1, 0) without either."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"]))
    return slurm.place() if slurm.in_step() else (0, 1, 0)


def init_process_group(timeout_s: float = 600.0) -> None:
    """Joins the default process group: NCCL where CUDA is present, gloo elsewhere. Does nothing for one process.

    Raises:
        LaunchError: the ranks cannot meet, or run different software (see `hcx.dist.rendezvous`).
    """
    rank, world_size, local_rank = process_environment()
    if world_size == 1 or torch.distributed.is_initialized():
        return
    store = rendezvous.join(rank, world_size)
    # Libraries read these instead of asking (DeepSpeed, NCCL's bootstrap).
    host, port = rendezvous.address()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_s)
    )


def destroy_process_group() -> None:
    """Leaves the default process group if this process joined one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
