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
    """The most so far, in MiB, of this process's part of a GPU, or of this process; nan where the system won't say.

    It won't on Windows, nor for Apple's GPU, whose memory is not the process's alone.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    if resource is None or device.type != "cpu":
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


ALLOCATION_FAILED = (
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
    "could not create a primitive",
    "can't start new thread",
    "std::bad_alloc",
)
"""What libraries say that allocate for themselves, and PyTorch of the memory of a CPU."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small, a GPU's or this machine's, in PyTorch's own words or in those of a library."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(reason in str(error) for reason in ALLOCATION_FAILED)
