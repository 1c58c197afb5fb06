"""The end of a residual cell, skip + 0.1 · gate · BN(x), in as few passes over memory as there can be.

Batch norm and the gate of squeeze-and-excitation are one factor and one offset per image and channel. Forward: after
the batch statistics one pass measures the channel means, one scales and adds. Backward: one pass makes two sums per
image and channel, one the gradient of x. Only x is kept. What lies between is a matter of (B, C) numbers.

Shapes: B batch, C channels, H W space; S hidden width of squeeze-and-excitation.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.distributed import all_mean
from ..core.precision import at_least_float32
from .batch_norm import Norm, Statistics, coefficients, measured
from .fusion import fused
from .native import channels_last


class Gate(NamedTuple):
    """Squeeze-and-excitation: two linear maps, and the factor of the gated branch."""

    squeeze: Tensor
    """(S, C)."""
    squeeze_bias: Tensor
    """(S)."""
    excite: Tensor
    """(C, S)."""
    excite_bias: Tensor
    """(C)."""
    scale: float

    def of(self, x: Tensor) -> Tensor:
        """scale · gate of x (B, C, H, W), (B, C), in the type of x; computed in that of the maps."""
        with torch.autocast(x.device.type, enabled=False):
            means = x.mean((2, 3), dtype=self.squeeze.dtype)
            hidden = F.relu(F.linear(means, self.squeeze, self.squeeze_bias))
            return (self.scale * torch.sigmoid(F.linear(hidden, self.excite, self.excite_bias))).to(x.dtype)


def gated_sum(skip: Tensor, x: Tensor, gate: Gate) -> Tensor:
    """skip + scale · gate · x, of which only x is kept."""
    if not torch.is_grad_enabled():
        return torch.addcmul(skip, x, gate.of(x)[:, :, None, None])
    return _joined(channels_last(skip), channels_last(x), None, None, gate)


def batch_norm_gated_sum(skip: Tensor, x: Tensor, norm: Norm, gate: Gate) -> tuple[Tensor, Statistics]:
    """skip + scale · gate · batch_norm(x), of which only x is kept, and x's statistics."""
    skip, x = channels_last(skip), channels_last(x)
    statistics = measured(x, norm)
    return _joined(skip, x, norm, statistics, gate), statistics


def _joined(skip: Tensor, x: Tensor, norm: Norm | None, statistics: Statistics | None, gate: Gate) -> Tensor:
    scales: tuple[Tensor | None, Tensor | None, Tensor | None, float, bool] = (None, None, None, 0.0, True)
    if norm is not None:
        scales = (norm.weight, norm.bias, statistics, norm.eps, norm.over_ranks)
    return cast(Tensor, _Joined.apply(skip, x, *scales, *gate))


class _Joined(torch.autograd.Function):
    """skip + scale · gate(mean of y) · y, with y = γ (x − mean)/sqrt(var + eps) + β, or x itself without moments."""

    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Tensor | None,
        eps: float,
        over_ranks: bool,
        squeeze: Tensor,
        squeeze_bias: Tensor,
        excite: Tensor,
        excite_bias: Tensor,
        scale: float,
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
            ctx.normalised, ctx.over_ranks = moments is not None, over_ranks
            ctx.scale, ctx.skip_type = scale, skip.dtype
            return _added(skip, x, mean, scale * gate * gain, scale * gate * offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, distances, hidden, gate, squeeze, excite = ctx.saved_tensors
        grad = channels_last(grads[0])
        mean, gain, offset, scale = norm
        pixels = x.shape[2] * x.shape[3]
        grad_sum, product_sum = _image_sums(x, grad, mean)  # (B, C): Σ grad, Σ grad (x − mean)

        # Through the gate.
        excite_grad = ctx.scale * (gain * product_sum + offset * grad_sum) * gate * (1 - gate)  # (B, C), of its logit
        squeeze_grad = excite_grad @ excite * (hidden > 0)  # (B, S), before the ReLU
        mean_grad = squeeze_grad @ squeeze  # (B, C), of the channel means of y
        gating = (
            squeeze_grad.t() @ (distances * gain + offset),
            squeeze_grad.sum(0),
            excite_grad.t() @ hidden,
            excite_grad.sum(0),
        )

        # The gradient of y is scale · gate · grad + mean_grad / pixels; through batch norm from there.
        factor, constant, slope = ctx.scale * gate, mean_grad / pixels, torch.zeros_like(mean)
        normalising: tuple[Tensor | None, ...] = (None, None)
        if ctx.normalised:
            weight_grad = ((factor * product_sum + mean_grad * distances) * scale).sum(0)
            bias_grad = (factor * grad_sum + mean_grad).sum(0)
            sums = torch.stack([bias_grad, weight_grad])
            grad_mean, product_mean = (all_mean(sums) if ctx.over_ranks else sums) / (len(x) * pixels)
            constant, slope = constant - grad_mean, scale * product_mean
            normalising = (weight_grad, bias_grad)
        x_grad = _input_gradient(x, grad, mean, factor * gain, constant * gain, slope * gain)
        return grad.to(ctx.skip_type), x_grad, *normalising, None, None, None, *gating, None


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
