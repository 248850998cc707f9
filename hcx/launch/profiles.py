"""What a cluster is made of, as plans and batch files need to know it: `slurm/profiles/*.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from hcx.artifacts import find_file, resource_names
from hcx.config import Config, load_config
from hcx.errors import LaunchError, did_you_mean

FOLDER = "slurm/profiles"
GIB = 1 << 30


class GpuProfile(Config):
    """One accelerator."""

    name: str
    """As its maker calls it."""
    memory_gib: float
    """Memory that a process can allocate, GiB."""
    tflops_bf16: float
    """Published dense bf16 peak, TFLOP/s."""
    hbm_gb_s: float
    """Bandwidth of its memory, GB/s (1e9 bytes)."""
    tflops_fp32: float | None = None
    """Published fp32 peak without tensor cores; a sixteenth of bf16's if not given."""
    achieved_fraction: float = 0.55
    """Share of the peak that matrix products of a training step reach; an assumption until it is measured."""
    reserved_gib: float = 2.0
    """Memory that the driver, the communication library and fragmentation take; an assumption until it is measured."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("memory_gib", "tflops_bf16", "hbm_gb_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}; must be above 0")
        if not 0 < self.achieved_fraction <= 1:
            raise ValueError(f"achieved_fraction = {self.achieved_fraction}; must be above 0 and at most 1")
        if not 0 <= self.reserved_gib < self.memory_gib:
            raise ValueError(f"reserved_gib = {self.reserved_gib}; must be from 0 to below memory_gib")
        return self

    def flops(self, precision: str) -> float:
        """Peak FLOP/s in a working precision."""
        peak = self.tflops_bf16 if precision == "bf16" else self.tflops_fp32 or self.tflops_bf16 / 16
        return peak * 1e12


class ClusterProfile(Config):
    """A cluster of equal nodes."""

    name: str
    """Names the profile for people."""
    gpus_per_node: int
    """Accelerators of a node; one process runs on each."""
    gpu: GpuProfile
    """The accelerator."""
    intra_node_gb_s: float
    """What one accelerator sends to the others of its node, GB/s in one direction."""
    inter_node_gb_s: float
    """What one accelerator sends to other nodes, GB/s in one direction: its share of the node's links."""
    slurm: dict[str, Any] = Field(default_factory=dict)
    """Settings of the batch system, read by `hcx launch slurm`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("gpus_per_node", "intra_node_gb_s", "inter_node_gb_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}; must be above 0")
        return self

    @property
    def usable_bytes(self) -> float:
        """Memory of one accelerator that a plan may fill."""
        return (self.gpu.memory_gib - self.gpu.reserved_gib) * GIB


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return [Path(name).stem for name in resource_names(FOLDER)]


def load_profile(name: str) -> ClusterProfile:
    """A shipped profile by its name, or a file of the user's own.

    Raises:
        LaunchError: there is neither.
        ConfigError: the file is not a profile; says which field is missing, wrong or unknown.
    """
    if name in profile_names():
        return load_config(ClusterProfile, find_file(f"{FOLDER}/{name}.yaml", FOLDER))
    if not Path(name).is_file():
        raise LaunchError(
            f"--profile {name}: no such file, and no shipped profile; {did_you_mean(name, profile_names())}"
        )
    return load_config(ClusterProfile, name)
