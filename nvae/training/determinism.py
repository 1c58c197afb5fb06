"""The same numbers every time, at the price of speed, also where the fastest way gives others each time (on GPUs)."""

import os

import torch

WORKSPACE = ":4096:8"
"""What cuBLAS may use to give the same sums each time (its documentation, "Results reproducibility")."""


def be_deterministic(wanted: bool) -> None:
    """Lets this process compute by deterministic algorithms only, or by any. Before the first computation on a GPU.

    cuDNN then does not try which algorithm is fastest. A value of CUBLAS_WORKSPACE_CONFIG that was given stays.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = not wanted  # else the fastest algorithm for shapes that do not change


def without_deterministic_way(error: BaseException) -> bool:
    """Whether an operator was called that PyTorch cannot compute deterministically on the device."""
    return isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error)
