"""How much memory a computation takes, and how tensors come to a device."""

import math
import sys

import torch
from torch import Tensor

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


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU's on a device. A GPU copies it when its turn comes; nobody waits for that."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


ALLOCATION_FAILED = ("CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
"""What libraries say that allocate for themselves."""


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory was too small, in PyTorch's own words or in those of a library that it calls."""
    return isinstance(error, torch.OutOfMemoryError) or any(reason in str(error) for reason in ALLOCATION_FAILED)
