"""Depthwise convolutions of the recipes' sizes, forward and backward: ours beside PyTorch's in both orders of memory.

On CUDA PyTorch's are cuDNN's, or its own kernels where those are faster.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.depthwise import depthwise_conv2d
from .timing import Times, in_turns

KERNEL = 5
OURS, ROWS, COLUMNS = "ours", "PyTorch, channels-last", "PyTorch"


@dataclass(frozen=True)
class Shape:
    """Of images that a decoder cell has widened."""

    recipe: str
    batch: int
    channels: int
    side: int


SHAPES = (Shape("cifar10", 32, 768, 16), Shape("celeba_64", 16, 384, 32), Shape("ffhq_256", 4, 180, 128))


def depthwise_times(shape: Shape, dtype: torch.dtype, rounds: int, device: torch.device) -> Times:
    """The three ways in turns: y, and the gradients of x and of the kernel."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.channels, shape.side, shape.side)
    x = torch.randn(size, generator=generator).to(device, dtype)
    weight = torch.randn(shape.channels, 1, KERNEL, KERNEL, generator=generator).to(device, dtype)
    rows = x.contiguous(memory_format=torch.channels_last)

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, 1, KERNEL // 2, 1, shape.channels)

    ways = {
        OURS: _both_ways(depthwise_conv2d, rows, weight),
        ROWS: _both_ways(torchs, rows, weight),
        COLUMNS: _both_ways(torchs, x, weight),
    }
    return in_turns(ways, rounds, device, warmup=3)


def _both_ways(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Callable[[], object]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        y = function(x, weight)
        return torch.autograd.grad(y, (x, weight), y.detach())

    return run
