"""Rehearsing CUDA-only libraries on CPU processes: redirects the few device calls that have no CPU path.

megatron-core's schedules, data-parallel wrapper and optimizers allocate with `device="cuda"` and compare tensor type
strings. On a machine without CUDA three redirects make them run unchanged over gloo, so that every parallel layout can
be tested before a cluster is paid for. Nothing happens at import, and never where CUDA is available: `enable()` states
the wish once per process, and engines enter `redirected()` around their calls into the library, so that other code
in the same process never sees a redirected torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hcx.errors import LaunchError

_enabled = False
_depth = 0


def enable() -> None:
    """States that this process rehearses. Refused where CUDA is available: the real thing runs there.

    Raises:
        LaunchError: CUDA is available.
    """
    global _enabled
    if torch.cuda.is_available():
        raise LaunchError("rehearsal redirects CUDA calls to the CPU, but CUDA is available: the libraries run there as they are")
    _enabled = True


def is_enabled() -> bool:
    """Whether `enable()` was called in this process."""
    return _enabled


class _CpuInsteadOfCuda(TorchFunctionMode):
    """Turns CUDA device arguments into CPU ones, and answers type strings as CUDA would."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        if func is torch.Tensor.cuda:
            return args[0]
        answer = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and isinstance(answer, str):
            # The optimizers recognise precisions by comparing with "torch.cuda.FloatTensor" and its like.
            return answer.replace("torch.", "torch.cuda.", 1) if not answer.startswith("torch.cuda.") else answer
        return answer


@contextlib.contextmanager
def redirected() -> Iterator[None]:
    """Runs its body with CUDA calls redirected to the CPU; does nothing where CUDA is available. Re-entrant.

    Covers the calling thread only; CPU autograd runs its backward there too.

    Raises:
        LaunchError: there is no CUDA and `enable()` was not called.
    """
    global _depth
    if torch.cuda.is_available():
        yield
        return
    if not _enabled:
        raise LaunchError(
            "megatron-core needs CUDA, and this machine has none; hcx train rehearses such a run on CPU processes, "
            "and other programs do so after hcx.dist.rehearsal.enable()"
        )
    if _depth:
        yield
        return
    current_device, synchronize = torch.cuda.current_device, torch.cuda.synchronize
    _depth += 1
    # megatron-core passes the answer on as `device=`, so a torch.device serves where CUDA gives an index.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    try:
        with _CpuInsteadOfCuda():
            yield
    finally:
        torch.cuda.current_device, torch.cuda.synchronize = current_device, synchronize
        _depth -= 1
