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
from .batch_norm import Norm, Statistics, measured
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
            if norm is None:
                norm = _no_norm(excite_bias)
            distances, means = _means_of_y(_image_means(x), norm)
            hidden = F.relu(F.linear(means, squeeze, squeeze_bias))  # (B, S)
            gate, factor, offset = _gated(F.linear(hidden, excite, excite_bias), norm, scale)
            ctx.save_for_backward(x, norm, distances, hidden, gate, squeeze, excite)
            return _added(skip, x, norm[0], factor, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, distances, hidden, gate, squeeze, excite = ctx.saved_tensors
        grad = channels_last(grads[0])
        pixels = x.shape[2] * x.shape[3]
        sums = _image_sums(x, grad, norm[0])

        # Through the gate.
        excite_grad, means = _gate_gradient(sums, norm, gate, distances, ctx.scale)  # (B, C), of its logit
        squeeze_grad = excite_grad @ excite * (hidden > 0)  # (B, S), before the ReLU
        mean_grad = squeeze_grad @ squeeze  # (B, C), of the channel means of y
        gating = squeeze_grad.t() @ means, squeeze_grad.sum(0), excite_grad.t() @ hidden, excite_grad.sum(0)

        # Through batch norm.
        shares: Tensor | None = None
        normalising: tuple[Tensor | None, ...] = (None, None)
        if ctx.normalised:
            count = len(x) * pixels * (world_size() if ctx.over_ranks else 1)
            own, shares = _norm_gradients(sums, norm, gate, distances, mean_grad, ctx.scale, count)
            normalising = own[1], own[0]
            shares = summed(shares) if ctx.over_ranks else shares
        x_grad = _input_gradient(x, grad, norm[0], *_slopes(norm, gate, mean_grad, shares, ctx.scale, pixels))
        return grad.to(ctx.skip_type), x_grad, *normalising, None, None, *gating, None


# -------------------------------------------------------------------------------- passes over (B, C) and (C) numbers


@fused(dynamic=True, few=True)
def _no_norm(like: Tensor) -> Tensor:
    """The coefficients (4, C) of a batch norm that changes nothing."""
    one = torch.ones_like(like)
    return torch.stack([0 * one, one, 0 * one, one])


@fused(dynamic=True, few=True)
def _means_of_y(means: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """From the channel means of x: how far they are from the batch's, and those of y; (B, C) each."""
    mean, gain, offset, _ = norm
    distances = means - mean
    return distances, distances * gain + offset


@fused(dynamic=True, few=True)
def _gated(logit: Tensor, norm: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gate, and what x − mean is multiplied with, and what is added, in scale · gate · y; (B, C) each."""
    _, gain, offset, _ = norm
    gate = torch.sigmoid(logit)
    return gate, scale * gate * gain, scale * gate * offset


@fused(dynamic=True, few=True)
def _gate_gradient(sums: Tensor, norm: Tensor, gate: Tensor, distances: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradient of the gate's logit from the `_image_sums`, and the channel means of y again; (B, C) each."""
    grad_sum, product_sum = sums
    _, gain, offset, _ = norm
    return scale * (gain * product_sum + offset * grad_sum) * gate * (1 - gate), distances * gain + offset


@fused(dynamic=True, few=True)
def _norm_gradients(
    sums: Tensor, norm: Tensor, gate: Tensor, distances: Tensor, mean_grad: Tensor, scale: float, count: int
) -> tuple[Tensor, Tensor]:
    """The gradients (2, C) of β and γ from y's, scale · gate · grad + mean_grad / pixels; and both over `count`."""
    grad_sum, product_sum = sums
    factor = scale * gate
    bias_grad = (factor * grad_sum + mean_grad).sum(0)
    weight_grad = ((factor * product_sum + mean_grad * distances) * norm[3]).sum(0)
    gradients = torch.stack([bias_grad, weight_grad])
    return gradients, gradients / count


@fused(dynamic=True, few=True)
def _slopes(
    norm: Tensor, gate: Tensor, mean_grad: Tensor, means: Tensor | None, scale: float, pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_input_gradient` takes: factor and constant (B, C), and slope (C).

    `means` (2, C), over the batch and ranks, of y's gradient and its product with x̂; None without a norm.
    """
    _, gain, _, inverse = norm
    factor, constant, slope = scale * gate, mean_grad / pixels, torch.zeros_like(gain)
    if means is not None:
        constant, slope = constant - means[0], inverse * means[1]
    return factor * gain, constant * gain, slope * gain


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
