"""What a measurement says of the machine that it was made on."""

from __future__ import annotations

import platform


def cpu_name() -> str:
    """The processor's model name, as the system states it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
