"""The machine that kernels are made for, and where they are kept."""

import os
import platform
from pathlib import Path


def cache_folder() -> Path | None:
    """Where libraries are kept: nvae/ in the user's cache folder, if there is such a thing."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "nvae"
    try:
        return Path.home() / ".cache" / "nvae"
    except RuntimeError:
        return None


def processor() -> str:
    """What the processor can do, as the system lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), *dict.fromkeys(features)])
