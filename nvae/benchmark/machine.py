"""What a machine could do at best, and how much a model asks of it."""

import ctypes
import platform
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.precision import AUTOCAST, Precision, allow_tf32
from ..models.base import Family
from ..training.throughput import training_flop
from .timing import synchronise


def matrix_peak(device: torch.device, precision: Precision, size: int | None = None, repeats: int = 9) -> float:
    """GFLOP/s of a square matrix product in a precision, measured."""
    allow_tf32(precision)
    dtype = AUTOCAST.get(precision, torch.float32)
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / median(seconds[2:]) / 1e9


def training_gflop(model: Family[Any], images: Tensor) -> float:
    """GFLOP of the products of a training step on images, as `training_flop` counts them."""
    return training_flop(model.eval(), images) / 1e9


def description(device: torch.device) -> dict[str, str | int]:
    """What figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def keep_memory() -> None:
    """Lets the C library keep what is freed for the next use: memory that is new to a process costs page faults.

    Raises UserError where the C library has no such setting (it is glibc's).
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        raise UserError("--keep-memory: needs glibc")
    most_mapped, most_kept = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    library.mallopt(most_mapped, 2**30)
    library.mallopt(most_kept, 2**31 - 1)
