"""Normal latents on a CPU, without gradients: parameters and densities in one pass each, in C++ (latents.cpp; spec §3).

Shapes: B images, L latent channels, h w space.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..native import addresses, channels_last, library, made_from, structure
from ..watching import watched

SOURCE = Path(__file__).with_name("latents.cpp")
MOST_TERMS = 3
"""Of raw parameters that are summed in one pass."""

_Normal = structure(
    "Normal",
    "images pixels channels terms repeated0 repeated1 repeated2 bfloat16_0 bfloat16_1 bfloat16_2 threads",
    "temperature",
    "raw0 raw1 raw2 mean sigma",
)
_Score = structure(
    "Score",
    "images pixels channels closed threads",
    "",
    "q_mean q_sigma p_mean p_sigma drawn z divergence log_q log_p",
)


def _takes(*tensors: Tensor, types: Sequence[torch.dtype]) -> bool:
    """Whether tensors are of these types, while nobody asks for gradients, traces or watches."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or watched(tensors[0]):
        return False
    return all(x.dtype in types for x in tensors) and library(SOURCE) is not None


def bounded_normal(raws: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, Tensor]:
    """Mean soft(m) and sigma (exp(soft(l)) + 0.01) · temperature of the sum of raw parameters (B, 2L, h, w).

    Those of fewer images count again for the next ones. Returns (B, L, h, w) each, float32.
    """
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
    made_from(SOURCE).normal(ctypes.byref(_Normal(*integers, temperature, *pointers)))
    return mean, sigma


def score_terms(
    q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor], drawn: Tensor, z: Tensor, closed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """KL (B, L) of q from p, log density (B,) of `drawn` under q and of z under p, in nats.

    q and p are mean and sigma; all tensors are (B, L, h, w). KL is in `closed` form, else the difference of the log
    densities.
    """
    if not _takes(*q, *p, drawn, z, types=(torch.float32,)):
        return NotImplemented  # type: ignore[no-any-return]
    images, channels, height, width = z.shape
    assert all(tensor.shape == z.shape for tensor in (*q, *p, drawn))
    tensors = [channels_last(tensor) for tensor in (*q, *p, drawn, z)]
    sums = z.new_empty(3, images, channels)
    integers = (images, height * width, channels, int(closed), torch.get_num_threads())
    made_from(SOURCE).score(ctypes.byref(_Score(*integers, *addresses(*tensors, *sums))))
    divergence, log_q, log_p = sums
    return divergence, log_q.sum(1), log_p.sum(1)
