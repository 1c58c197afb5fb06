"""How much memory a computation takes."""

import math
import sys

import torch

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

MIB = 2**20


def peak_mib(device: torch.device) -> float:
    """The most so far, in MiB, of this process's part of a GPU, or of this process; nan where the system won't say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
