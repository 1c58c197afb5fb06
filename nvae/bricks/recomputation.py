"""Parts of a network that run again in the backward pass instead of keeping what is inside (Chen et al. 2016)."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recomputed(part: Callable[..., Result], *inputs: Any) -> Result:
    """part(*inputs), of which only the inputs are kept for the backward pass. The part draws no random numbers."""
    if not torch.is_grad_enabled():
        return part(*inputs)
    result: Result = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


class Recomputable(nn.Module):
    """A part of the network that, with `recompute`, keeps only its input and runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False

    def run(self, part: Callable[..., Result], *inputs: Any) -> Result:
        """part(*inputs)."""
        return recomputed(part, *inputs) if self.recompute else part(*inputs)
