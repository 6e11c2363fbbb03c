"""Where figures were taken: commit, versions, hardware, and how busy it was."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpsgd.report import environment

_CPUINFO = Path("/proc/cpuinfo")


def facts(*packages: str) -> dict[str, Any]:
    """Returns what is saved beside the rows of a benchmark.

    Args:
        packages: What a benchmark measures beside those that every run names.
    """
    found = environment()
    found["versions"] |= {name: version(name) for name in packages}
    return {
        **found,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def processor() -> str:
    """Returns the name of the processor, or of its instructions where it has none."""
    if _CPUINFO.is_file():  # Linux, where platform knows the instructions alone
        for line in _CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
