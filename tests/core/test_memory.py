"""What counts as running out of memory, and how much of it was taken."""

import math
from types import SimpleNamespace

import pytest
import torch

from nvae.core import memory
from nvae.core.memory import ran_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_libraries_that_allocate_for_themselves_count_too(error: Exception, expected: bool) -> None:
    assert ran_out_of_memory(error) == expected


@pytest.mark.parametrize(("platform", "size"), [("darwin", 3 * 2**20), ("linux", 3 * 2**10)])
def test_the_peak_is_in_mib_whatever_unit_the_system_counts_in(
    platform: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes on macOS, KiB on Linux."""
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=size))
    monkeypatch.setattr(memory, "resource", usage)
    monkeypatch.setattr(memory.sys, "platform", platform)
    assert memory.peak_mib(torch.device("cpu")) == 3


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_system_that_does_not_say_is_not_a_number(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resource", None)
    assert math.isnan(memory.peak_mib(torch.device(device)))
