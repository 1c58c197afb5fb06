"""What counts as running out of memory."""

import pytest
import torch

from nvae.core.memory import ran_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_libraries_that_allocate_for_themselves_count_too(error: RuntimeError, expected: bool) -> None:
    assert ran_out_of_memory(error) == expected
