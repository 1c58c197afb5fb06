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

from ..core.distributed import summed, world_size
from ..core.precision import at_least_float32
from .batch_norm import Norm, Statistics, measured, sum_of_pixels
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
    statistics, factors = measured(x, norm)
    return _joined(skip, x, norm, factors, gate), statistics


def _joined(skip: Tensor, x: Tensor, norm: Norm | None, factors: Tensor | None, gate: Gate) -> Tensor:
    scales: tuple[Tensor | None, Tensor | None, Tensor | None, bool] = (None, None, None, True)
    if norm is not None:
        scales = (norm.weight, norm.bias, factors, norm.over_ranks)
    return cast(Tensor, _Joined.apply(skip, x, *scales, *gate))


class _Joined(torch.autograd.Function):
    """skip + scale · gate(mean of y) · y, with y = γ (x − mean)/sqrt(var + eps) + β, or x itself without a norm."""

    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Tensor | None,
        over_ranks: bool,
        squeeze: Tensor,
        squeeze_bias: Tensor,
        excite: Tensor,
        excite_bias: Tensor,
        scale: float,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            ctx.normalised, ctx.over_ranks, ctx.scale, ctx.skip_type = norm is not None, over_ranks, scale, skip.dtype
            distances, means = _means_of_y(x, norm, bias)
            hidden = F.relu(F.linear(means, squeeze, squeeze_bias))  # (B, S)
            gate, factor, offset = _gated(F.linear(hidden, excite, excite_bias), norm, bias, scale)
            ctx.save_for_backward(x, norm, bias, distances, hidden, gate, squeeze, excite)
            return _added(skip, x, norm, factor, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, bias, distances, hidden, gate, squeeze, excite = ctx.saved_tensors
        grad = channels_last(grads[0])
        with torch.autocast(x.device.type, enabled=False):
            # Through the gate.
            grad_sum, product_sum, excite_grad, means = _gate_gradient(
                x, grad, norm, bias, gate, distances, ctx.scale
            )  # (B, C) each
            squeeze_grad, squeeze_bias_grad = _before_relu(excite_grad @ excite, hidden)  # (B, S)
            mean_grad = squeeze_grad @ squeeze  # (B, C), of the channel means of y
            gating = squeeze_grad.t() @ means, squeeze_bias_grad, excite_grad.t() @ hidden, excite_grad.sum(0)

        # Through batch norm.
        shares: Tensor | None = None
        normalising: tuple[Tensor | None, ...] = (None, None)
        if ctx.normalised:
            count = x.numel() // x.shape[1] * (world_size() if ctx.over_ranks else 1)
            own, shares = _norm_gradients(grad_sum, product_sum, norm, gate, distances, mean_grad, ctx.scale, count)
            normalising = own[1], own[0]
            shares = summed(shares) if ctx.over_ranks else shares
        x_grad = _input_gradient(x, grad, norm, gate, mean_grad, shares, ctx.scale)
        return grad.to(ctx.skip_type), x_grad, *normalising, None, None, *gating, None


# -------------------------------------------------------------------------------- passes over (B, C) and (C) numbers


@fused(dynamic=True, few=True)
def _gated(
    logit: Tensor, norm: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gate, and what x − mean is multiplied with, and what is added, in scale · gate · y; (B, C) each."""
    gate = torch.sigmoid(logit)
    factor = scale * gate
    return (gate, factor, None) if norm is None or bias is None else (gate, factor * norm[1], factor * bias)


@fused(dynamic=True, few=True)
def _before_relu(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient (B, S) of a ReLU's input, from that of its output `hidden`; and its sum over the batch."""
    masked = grad * (hidden > 0)
    return masked, masked.sum(0)


@fused(dynamic=True, few=True)
def _norm_gradients(
    grad_sum: Tensor,
    product_sum: Tensor,
    norm: Tensor,
    gate: Tensor,
    distances: Tensor,
    mean_grad: Tensor,
    scale: float,
    count: int,
) -> tuple[Tensor, Tensor]:
    """The gradients (2, C) of β and γ from y's, scale · gate · grad + mean_grad / pixels; and both over `count`."""
    factor = scale * gate
    bias_grad = (factor * grad_sum + mean_grad).sum(0)
    weight_grad = ((factor * product_sum + mean_grad * distances) * norm[2]).sum(0)
    return torch.stack([bias_grad, weight_grad]), torch.stack([bias_grad / count, weight_grad / count])


# ------------------------------------------------------------------------------------------------ passes over memory


@fused(dynamic=True)
def _means_of_y(x: Tensor, norm: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """How far the channel means of x are from the batch's, and those of y; (B, C) each, float32 or more."""
    means = sum_of_pixels(at_least_float32(x)) / (x.shape[2] * x.shape[3])
    distances = means if norm is None else means - norm[0]
    return distances, _of_y(distances, norm, bias)


@fused(dynamic=True)
def _added(skip: Tensor, x: Tensor, norm: Tensor | None, factor: Tensor, offset: Tensor | None) -> Tensor:
    """skip + factor · (x − mean) + offset; factor and offset (B, C)."""
    residual = _centred(x, norm) * factor[:, :, None, None]
    if offset is not None:
        residual = residual + offset[:, :, None, None]
    return (skip + residual).to(torch.promote_types(skip.dtype, x.dtype))


@fused(dynamic=True)
def _gate_gradient(
    x: Tensor,
    grad: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    gate: Tensor,
    distances: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ grad and Σ grad · (x − mean) over H and W, the gradient of the gate's logit, and the channel means of y again;
    (B, C) each, float32 or more."""
    wide = at_least_float32(grad)
    grad_sum, product_sum = sum_of_pixels(wide), sum_of_pixels(wide * _centred(x, norm))
    y_sum = product_sum if norm is None or bias is None else norm[1] * product_sum + bias * grad_sum
    return grad_sum, product_sum, scale * y_sum * gate * (1 - gate), _of_y(distances, norm, bias)


@fused(dynamic=True)
def _input_gradient(
    x: Tensor, grad: Tensor, norm: Tensor | None, gate: Tensor, mean_grad: Tensor, means: Tensor | None, scale: float
) -> Tensor:
    """γ/σ · (scale · gate · grad + mean_grad / pixels), and through batch statistics if there are any.

    `means` (2, C), over the batch and ranks, of y's gradient and its product with x̂.
    """
    factor, constant = scale * gate, mean_grad / (x.shape[2] * x.shape[3])  # (B, C)
    if norm is None or means is None:
        x_grad = at_least_float32(grad) * factor[:, :, None, None] + constant[:, :, None, None]
        return x_grad.to(x.dtype)
    _, gain, inverse = norm
    factor, constant, slope = factor * gain, (constant - means[0]) * gain, inverse * means[1] * gain
    x_grad = at_least_float32(grad) * factor[:, :, None, None] + constant[:, :, None, None]
    x_grad = x_grad - slope[:, None, None] * _centred(x, norm)
    return cast(Tensor, x_grad.to(x.dtype))


def _of_y(distances: Tensor, norm: Tensor | None, bias: Tensor | None) -> Tensor:
    """The channel means of y (B, C)."""
    return distances if norm is None or bias is None else distances * norm[1] + bias


def _centred(x: Tensor, norm: Tensor | None) -> Tensor:
    """x − mean, float32 or more; x itself without a norm."""
    return at_least_float32(x) if norm is None else at_least_float32(x) - norm[0, :, None, None]
