"""Latents of a group in C++ (bottleneck.cpp): distributions and their scores in one pass each (spec §3).

Float32 or bfloat16 comes in, float32 out, without gradients. Shapes: B images, L latent channels, h w space of a group.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..native import addresses, channels_last, library, made_from, structure
from ..watching import watched

SOURCE = Path(__file__).with_name("bottleneck.cpp")
MOST_TERMS = 3
"""Of raw parameters that are summed in one pass."""

_NormalStruct = structure(
    "Normal",
    "images pixels channels terms repeated0 repeated1 repeated2 bfloat16_0 bfloat16_1 bfloat16_2 threads",
    "temperature",
    "raw0 raw1 raw2 mean sigma",
)
_ScoreStruct = structure(
    "Score",
    "images pixels channels closed threads",
    "",
    "q_mean q_sigma p_mean p_sigma drawn z divergence log_q log_p",
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the library can be had."""
    return library(SOURCE) is not None


def _takes(*tensors: Tensor, types: tuple[torch.dtype, ...]) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or watched(tensors[0]):
        return False
    return all(tensor.dtype in types for tensor in tensors) and available()


def bounded_normal(raws: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, Tensor]:
    """Mean and sigma (B, L, h, w), float32, of summed raw parameters (B, 2L, h, w)."""
    if len(raws) > MOST_TERMS or not _takes(*raws, types=(torch.float32, torch.bfloat16)):
        return NotImplemented  # type: ignore[no-any-return]
    images, channels, height, width = raws[0].shape
    assert all(raw.shape[1:] == raws[0].shape[1:] and images % max(len(raw), 1) == 0 for raw in raws)
    laid_out = [channels_last(raw) for raw in raws]
    shape = (images, channels // 2, height, width)
    mean, sigma = (torch.empty(shape, memory_format=torch.channels_last) for _ in range(2))
    missing = MOST_TERMS - len(raws)
    repeated = [*map(len, raws), *[1] * missing]
    bfloat16 = [*(int(raw.dtype == torch.bfloat16) for raw in raws), *[0] * missing]
    integers = (images, height * width, channels // 2, len(raws), *repeated, *bfloat16, torch.get_num_threads())
    pointers = addresses(*laid_out, *[None] * missing, mean, sigma)
    made_from(SOURCE).normal(ctypes.byref(_NormalStruct(*integers, temperature, *pointers)))
    return mean, sigma


def score_terms(
    q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor], drawn: Tensor, z: Tensor, closed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """KL (B, L), log q and log p (B,), in nats, of a draw; q and p are mean and sigma."""
    tensors = [*q, *p, drawn, z]
    if not _takes(*tensors, types=(torch.float32,)):
        return NotImplemented  # type: ignore[no-any-return]
    images, channels, height, width = z.shape
    assert all(tensor.shape == z.shape for tensor in tensors)
    tensors = [channels_last(tensor) for tensor in tensors]
    sums = z.new_empty(3, images, channels)
    integers = (images, height * width, channels, int(closed), torch.get_num_threads())
    made_from(SOURCE).score(ctypes.byref(_ScoreStruct(*integers, *addresses(*tensors, *sums))))
    return sums[0], sums[1].sum(1), sums[2].sum(1)
