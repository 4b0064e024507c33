"""What a measurement of time is about: the processor."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """Returns the processor's name, or its kind where the system does not tell more."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
