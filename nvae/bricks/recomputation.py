"""Parts of a network that run again in the backward pass instead of keeping what is inside (Chen et al. 2016)."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recomputed(part: Callable[..., Result], *inputs: Any, draws: bool = False) -> Result:
    """part(*inputs), of which only the inputs are kept for the backward pass.

    `draws`: whether it draws random numbers; the second run then draws the same ones.
    """
    if not torch.is_grad_enabled():
        return part(*inputs)
    result: Result = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return result


class Recomputable(nn.Module):
    """A part of the network that, with `recompute`, keeps only its input and runs again in the backward pass."""

    draws: ClassVar[bool] = False
    """Whether it draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False

    def run(self, part: Callable[..., Result], *inputs: Any) -> Result:
        """part(*inputs)."""
        return recomputed(part, *inputs, draws=self.draws) if self.recompute else part(*inputs)
