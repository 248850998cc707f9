"""What works on this machine, and why not.

Each finding is a `Check`: a status, what was found and, where something is missing, the reason and the next step.
Nothing heavy is imported but torch; optional packages are looked up by their metadata, not run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import hcx
from hcx.artifacts import resource_names
from hcx.obs.machine import cpu_name

DISTRIBUTION = "hcx-llm"
MINIMUM_PYTHON = (3, 11)
RESOURCE_FOLDERS = ("launch", "evals", "tokenizer", "slurm")
ISA_FLAGS = ("sse4_2", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve")
"""Instruction sets that matrix products profit from, by their names in /proc/cpuinfo."""
GIB = 1 << 30

Status = Literal["ok", "absent", "broken"]


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        area: group for display (`core`, `machine`, `gpu`, `build`, `extras`, `kernels`, `resources`).
        name: what was looked at.
        status: `ok`; `absent` (optional, not usable here); `broken` (hcx cannot work without it).
        value: what was found.
        reason: why it is absent or broken, and what to do; a remark if `ok`.
    """

    area: str
    name: str
    status: Status
    value: str
    reason: str = ""

    def to_json(self) -> dict[str, str]:
        """A plain mapping for `--json`."""
        return asdict(self)


def examine() -> list[Check]:
    """Looks at everything; a check that fails unexpectedly becomes a finding, never an exception."""
    findings: list[Check] = []
    groups: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("core", _core),
        ("machine", _machine),
        ("gpu", _gpu),
        ("build", _build),
        ("distributed", _distributed),
        ("kernels", _kernels),
        ("extras", _extras),
        ("resources", _resources),
    )
    for area, group in groups:
        try:
            findings.extend(group())
        except Exception as error:  # the doctor reports what it meets
            findings.append(Check(area, area, "broken", "", f"the check itself failed: {_short(error)}"))
    return findings


def is_healthy(findings: list[Check]) -> bool:
    """Whether nothing that hcx needs is broken."""
    return all(check.status != "broken" for check in findings)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _installed(requirement: Any) -> tuple[str | None, str]:
    """(installed version or None, what is wrong or an empty string)."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None, f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return version, f"{requirement.name} {version} is installed, but {requirement.specifier} is needed"
    return version, ""


def _core() -> Iterator[Check]:
    version = platform.python_version()
    ok = sys.version_info >= MINIMUM_PYTHON
    needed = ".".join(map(str, MINIMUM_PYTHON))
    yield Check("core", "python", "ok" if ok else "broken", version, "" if ok else f"{needed} or newer is needed")
    yield Check("core", "hcx", "ok", hcx.__version__, str(Path(hcx.__file__).parent))
    requirements = _requirements()
    if not requirements:
        reason = f"the metadata of {DISTRIBUTION} was not found; install with: pip install -e ."
        yield Check("core", "dependencies", "absent", "", reason)
    base = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [problem for r in base for problem in [_installed(r)[1]] if problem]
    if wrong:
        yield Check("core", "dependencies", "broken", f"{len(base)} declared", "; ".join(wrong))
    elif base:
        yield Check("core", "dependencies", "ok", f"{len(base)} of {len(base)} installed")
    try:
        import torch

        yield Check("core", "torch", "ok", torch.__version__)
    except Exception as error:  # a broken wheel raises OSError or ImportError
        yield Check("core", "torch", "broken", "", f"import failed: {_short(error)}; reinstall torch")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def usable_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> tuple[int, int]:
    """(total, available), under the container's limit if there is one."""
    found = {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M)}
    total = found.get("MemTotal", 0)
    if not total and hasattr(os, "sysconf"):
        with contextlib.suppress(ValueError, OSError):
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = found.get("MemAvailable", total)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and 0 < int(limit) < total:
        used = _read("/sys/fs/cgroup/memory.current").strip()
        available = min(available, int(limit) - (int(used) if used.isdigit() else 0))
        total = int(limit)
    return total, available


def _machine() -> Iterator[Check]:
    yield Check("machine", "cpu", "ok", cpu_name(), f"{platform.system()} {platform.machine()}")
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    flags = set(match.group(1).split()) if match else set()
    found = [flag for flag in ISA_FLAGS if flag in flags]
    with contextlib.suppress(Exception):
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        yield Check("machine", "instruction sets", "ok", " ".join(found) or "unknown", f"torch uses {capability}")
        omp = os.environ.get("OMP_NUM_THREADS")
        remark = f"OMP_NUM_THREADS={omp}" if omp else "OMP_NUM_THREADS is not set"
        yield Check(
            "machine", "threads", "ok", f"{usable_cpus()} CPUs, torch uses {torch.get_num_threads()} threads", remark
        )
    total, available = _memory_bytes()
    yield Check("machine", "memory", "ok", f"{total / GIB:.1f} GiB", f"{available / GIB:.1f} GiB available")
    for name, path in (("disk here", Path.cwd()), ("disk for temporary files", Path(tempfile.gettempdir()))):
        usage = shutil.disk_usage(path)
        yield Check("machine", name, "ok", f"{usage.free / GIB:.1f} GiB free", str(path))


def _gpu() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            value = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
            capability = f"compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
            yield Check("gpu", f"cuda:{index}", "ok", value, capability)
        return
    has_driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        reason = f"torch {torch.__version__} is built without CUDA"
        reason += "; install a CUDA build of torch" if has_driver else ", and no NVIDIA driver was found"
    elif not has_driver:
        reason = f"torch is built for CUDA {torch.version.cuda}, but no NVIDIA driver was found"
    else:
        reason = "a driver is present, but torch sees no device: check CUDA_VISIBLE_DEVICES and the driver's version"
    yield Check("gpu", "cuda", "absent", "none; everything runs on the CPU", reason)


def _build() -> Iterator[Check]:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        yield Check("build", "C++ compiler", "ok", compiler)
    else:
        yield Check("build", "C++ compiler", "absent", "none", "not needed to run; native kernels cannot be built here")


def _distributed() -> Iterator[Check]:
    import torch.distributed as dist

    if not dist.is_available():
        yield Check("distributed", "gloo", "absent", "", "this torch is built without torch.distributed")
        return
    if not dist.is_gloo_available():
        yield Check("distributed", "gloo", "absent", "", "this torch is built without gloo: one process only")
    elif dist.is_initialized():
        yield Check("distributed", "gloo", "ok", "a process group is already running")
    else:
        yield _try_gloo()
    nccl = dist.is_nccl_available()
    yield Check("distributed", "nccl", "ok" if nccl else "absent", "", "" if nccl else "only in CUDA builds of torch")
    sbatch = shutil.which("sbatch")
    yield Check(
        "distributed", "slurm", "ok" if sbatch else "absent", sbatch or "", "" if sbatch else "sbatch not found"
    )


def _try_gloo() -> Check:
    """A group of one process and one reduction: finds host names that do not resolve before a run does."""
    import torch
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            value = torch.ones(1)
            dist.all_reduce(value)
        finally:
            dist.destroy_process_group()
        return Check("distributed", "gloo", "ok", "a reduction ran in a group of one process")
    except Exception as error:
        reason = f"{_short(error)}; set GLOO_SOCKET_IFNAME=lo if the host name does not resolve"
        return Check("distributed", "gloo", "absent", "", reason)


def _extras() -> Iterator[Check]:
    requirements = [r for r in _requirements() if r.marker is not None and not r.marker.evaluate({"extra": ""})]
    names = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") if requirements else []
    for extra in sorted(names or []):
        own = [r for r in requirements if r.marker.evaluate({"extra": extra})]
        found = {r.name: _installed(r) for r in own}
        wrong = [problem for _, problem in found.values() if problem]
        value = ", ".join(f"{name} {version}" for name, (version, _) in found.items() if version)
        if len(found) > 4:
            value = f"{len(found) - len(wrong)} of {len(found)} packages"
        if wrong:
            reason = f"{'; '.join(wrong)}; install with: pip install '{DISTRIBUTION}[{extra}]'"
            yield Check("extras", extra, "absent", value, reason)
        else:
            yield Check("extras", extra, "ok", value)


def _kernels() -> Iterator[Check]:
    from hcx.kernels import Spec, native
    from hcx.kernels.registry import backends, backends_by_name

    path = native.library_path()
    if path is None:
        value = "none; the reference does all work, compression and decoded tokens in torch"
        yield Check("kernels", "native library", "absent", value, native.why_absent() or "")
    else:
        value = f"{native.isa_name()}; products, codes of weights, decoded tokens"
        yield Check("kernels", "native library", "ok", value, path)
    usual = {"out_features": 4096, "in_features": 4096, "bits": 3, "group_size": 128, "has_offset": True}
    for backend in (*backends(), *backends_by_name()):
        why = backend.why_not(Spec("cpu" if backend.device == "any" else backend.device, **usual))  # type: ignore[arg-type]
        remark = why or f"on {'any device' if backend.device == 'any' else backend.device}"
        if backend in backends_by_name():
            remark += "; never run on a GPU so far: taken only by name"
        yield Check("kernels", backend.name, "absent" if why else "ok", f"numerics {backend.numerics}", remark)


def _resources() -> Iterator[Check]:
    for folder in RESOURCE_FOLDERS:
        names = resource_names(folder)
        if names:
            yield Check("resources", folder, "ok", f"{len(names)} YAML files")
        else:
            yield Check("resources", folder, "absent", "none", "this installation carries no file of this folder")
