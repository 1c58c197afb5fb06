"""The end of a residual cell: skip + 0.1 · SE(BN(x)), in as few passes over memory as there can be (spec §1).

Batch norm and the gate of squeeze-and-excitation are one factor and one offset per image and channel. Forward: after
the batch statistics one pass measures the channel means, one scales and adds. Backward: one pass makes two sums per
image and channel, one the gradient of x. Only x is kept. What lies between is a matter of (B, C) numbers.

Shapes: B batch, C channels, H W space; S hidden width of squeeze-and-excitation.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.distributed import all_mean
from ..core.precision import at_least_float32
from ..kernels.fusion import fused
from .normalisation import BatchNorm, coefficients

SCALE = 0.1
"""Of the residual branch (spec §1)."""


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channel means (Hu et al. 2018); hidden width max(C // 16, 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, skip: Tensor, x: Tensor, norm: BatchNorm | None = None) -> Tensor:
        """skip + 0.1 · gate · norm(x), (B, C, H, W) each, in the wider type of both; the gate in float32 or more.

        Only x is kept for the backward pass.
        """
        if norm is not None and not norm.training:
            x, norm = norm(x), None
        if norm is None and not torch.is_grad_enabled():
            return torch.addcmul(skip, x, self._scale(x)[:, :, None, None])
        skip, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (skip, x))
        batch_norm = (None, None, None) if norm is None else (norm.weight, norm.bias, norm.batch_statistics(x))
        gate = (self.squeeze.weight, self.squeeze.bias, self.excite.weight, self.excite.bias)
        return cast(Tensor, _Joined.apply(skip, x, *batch_norm, BatchNorm.eps, *gate))

    def _scale(self, x: Tensor) -> Tensor:
        """0.1 · gate of x, (B, C)."""
        with torch.autocast(x.device.type, enabled=False):
            means = x.mean((2, 3), dtype=self.squeeze.weight.dtype)
            return (SCALE * torch.sigmoid(self.excite(F.relu(self.squeeze(means))))).to(x.dtype)


class _Joined(torch.autograd.Function):
    """skip + 0.1 · gate(mean of y) · y, with y = γ (x − mean)/sqrt(var + eps) + β, or x itself without moments."""

    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Tensor | None,
        eps: float,
        squeeze: Tensor,
        squeeze_bias: Tensor,
        excite: Tensor,
        excite_bias: Tensor,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if moments is None or weight is None or bias is None:
                one = squeeze.new_ones(x.shape[1])
                norm = torch.stack([0 * one, one, 0 * one, one])
            else:
                norm = coefficients(weight, bias, moments, eps)
            mean, gain, offset, _ = norm
            distances = _image_means(x) - mean  # (B, C)
            hidden = F.relu(F.linear(distances * gain + offset, squeeze, squeeze_bias))  # (B, S)
            gate = torch.sigmoid(F.linear(hidden, excite, excite_bias))  # (B, C)
            ctx.save_for_backward(x, norm, distances, hidden, gate, squeeze, excite)
            ctx.normalised, ctx.skip_type = moments is not None, skip.dtype
            return _added(skip, x, mean, SCALE * gate * gain, SCALE * gate * offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, distances, hidden, gate, squeeze, excite = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        mean, gain, offset, scale = norm
        pixels = x.shape[2] * x.shape[3]
        grad_sum, product_sum = _image_sums(x, grad, mean)  # (B, C): Σ grad, Σ grad (x − mean)

        # Through the gate.
        excite_grad = SCALE * (gain * product_sum + offset * grad_sum) * gate * (1 - gate)  # (B, C), of its logit
        squeeze_grad = excite_grad @ excite * (hidden > 0)  # (B, S), before the ReLU
        mean_grad = squeeze_grad @ squeeze  # (B, C), of the channel means of y
        gating = (
            squeeze_grad.t() @ (distances * gain + offset),
            squeeze_grad.sum(0),
            excite_grad.t() @ hidden,
            excite_grad.sum(0),
        )

        # The gradient of y is 0.1 · gate · grad + mean_grad / pixels; through batch norm from there.
        factor, constant, slope = SCALE * gate, mean_grad / pixels, torch.zeros_like(mean)
        normalising: tuple[Tensor | None, ...] = (None, None)
        if ctx.normalised:
            weight_grad = ((factor * product_sum + mean_grad * distances) * scale).sum(0)
            bias_grad = (factor * grad_sum + mean_grad).sum(0)
            grad_mean, product_mean = all_mean(torch.stack([bias_grad, weight_grad])) / (len(x) * pixels)
            constant, slope = constant - grad_mean, scale * product_mean
            normalising = (weight_grad, bias_grad)
        x_grad = _input_gradient(x, grad, mean, factor * gain, constant * gain, slope * gain)
        return grad.to(ctx.skip_type), x_grad, *normalising, None, None, *gating


# ------------------------------------------------------------------------------------------------ passes over memory


@fused(dynamic=True)
def _image_means(x: Tensor) -> Tensor:
    """(B, C), float32 or more."""
    return at_least_float32(x).sum(3).sum(2) / (x.shape[2] * x.shape[3])


@fused(dynamic=True)
def _added(skip: Tensor, x: Tensor, mean: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """skip + factor · (x − mean) + offset; mean (C), factor and offset (B, C)."""
    residual = (at_least_float32(x) - mean[:, None, None]) * factor[:, :, None, None] + offset[:, :, None, None]
    return (skip + residual).to(torch.promote_types(skip.dtype, x.dtype))


@fused(dynamic=True)
def _image_sums(x: Tensor, grad: Tensor, mean: Tensor) -> Tensor:
    """(2, B, C): Σ grad and Σ grad · (x − mean) over H and W, float32 or more."""
    wide = at_least_float32(grad)
    product = wide * (at_least_float32(x) - mean[:, None, None])
    return torch.stack([wide.sum(3).sum(2), product.sum(3).sum(2)])


@fused(dynamic=True)
def _input_gradient(x: Tensor, grad: Tensor, mean: Tensor, factor: Tensor, constant: Tensor, slope: Tensor) -> Tensor:
    """factor · grad + constant − slope · (x − mean); factor and constant (B, C), mean and slope (C)."""
    x_grad = at_least_float32(grad) * factor[:, :, None, None] + constant[:, :, None, None]
    return (x_grad - slope[:, None, None] * (at_least_float32(x) - mean[:, None, None])).to(x.dtype)
