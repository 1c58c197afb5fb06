"""Weight normalisation in a pass over the weights each way (spec §1; Salimans & Kingma 2016).

Shapes: O outputs, R numbers of a kernel.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fusion import fused, is_worth_a_pass

FEW = 8
"""Rows of each matrix that kernels are compared on."""


def weight_norm(weight: Tensor, log_gain: Tensor) -> Tensor:
    """exp(g) · v / (‖v‖₂ + 1e-5), the norm over the last axis. weight (…, O, R), log_gain (…, O, 1)."""
    if not is_worth_a_pass(weight):
        return NotImplemented  # type: ignore[no-any-return]
    return cast(Tensor, _WeightNorm.apply(weight, log_gain))


class _WeightNorm(torch.autograd.Function):
    """`weight_norm`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_gain: Tensor) -> Tensor:
        ctx.save_for_backward(weight, log_gain)
        return _normalised(weight, log_gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(*grads, *ctx.saved_tensors)


def _first_rows(*args: Tensor) -> tuple[Tensor, ...]:
    return tuple(arg[..., :FEW, :] for arg in args)


@fused(dynamic=True, few=True, small=_first_rows)
def _normalised(weight: Tensor, log_gain: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return log_gain.exp() * weight / (norm + 1e-5)


@fused(dynamic=True, few=True, small=_first_rows)
def _gradients(grad: Tensor, weight: Tensor, log_gain: Tensor) -> tuple[Tensor, Tensor]:
    """Of v and of g; the slope of the norm n of v is v/n, 0 at 0."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    gain, below = log_gain.exp(), norm + 1e-5
    of_product = grad / below
    of_norm = (-grad * ((gain * weight / below) / below)).sum(-1, keepdim=True)
    of_gain = (of_product * weight).sum(-1, keepdim=True)
    return of_product * gain + of_norm * (weight / norm).masked_fill(norm == 0, 0), of_gain * gain
