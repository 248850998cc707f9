"""Loading a model for the verbs that run one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hcx.errors import ConfigError

if TYPE_CHECKING:
    from hcx.model.load import LoadedModel


def load_for_inference(
    directory: Path,
    numerics: str,
    kernel: str | None,
    device: str,
    adapter: Path | None = None,
    bits: int | None = None,
    tasks: dict[str, Path] | None = None,
) -> LoadedModel:
    """Any model directory on the chosen device.

    Args:
        directory: full precision or BCQ.
        numerics: class of the kernels.
        kernel: a kernel by name, or None for the automatic choice.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`.
        adapter: a directory of low-rank updates (PEFT's files) or of a task's scales, or None.
        bits: the width of a model with nested planes, or None for the widest.
        tasks: name -> directory of a task's scales, for requests that name it.

    Raises:
        ConfigError: an unknown class or device.
        CheckpointError, KernelError: see `load_model`.
    """
    import torch

    from hcx.kernels.registry import NUMERICS
    from hcx.model.load import load_model

    if numerics not in NUMERICS:
        raise ConfigError(f"--numerics {numerics}; valid: {', '.join(NUMERICS)}")
    if kernel is not None:
        # The one override that backend choice reads.
        os.environ["HCX_KERNEL"] = kernel
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device}; valid: auto, cpu, cuda, cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: no CUDA device here; use --device cpu")
    return load_model(directory, device=chosen, numerics=numerics, adapter=adapter, bits=bits, tasks=tasks)
