"""Batch norm with its activation in as few passes over memory as there can be, alone or carried through a convolution.

Forward: one pass measures, one normalises and activates. Backward: one pass makes the activated input again, its
slope and both sums; one makes the gradient of x. Only x is kept.

Shapes: B batch, C channels, H W space.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.distributed import summed, world_size
from ..core.precision import at_least_float32
from .activations import Activation, in_a_pass, with_slope
from .convolution import Geometry, convolve, for_autocast, input_gradient, parameter_gradients
from .fusion import fused
from .native import channels_last

Statistics = Tensor
"""Mean and biased variance of a batch, (2, C), float32 or more."""


class Norm(NamedTuple):
    """What a batch norm is, but for its running statistics."""

    weight: Tensor
    """γ, (C)."""
    bias: Tensor
    """β, (C)."""
    eps: float
    activation: Activation
    over_ranks: bool = True
    """Whether statistics are those of all ranks' batches."""
    statistics: Statistics | None = None
    """Measured before on the same input, by a pass that is now repeated."""


def batch_norm(x: Tensor, norm: Norm) -> tuple[Tensor, Statistics]:
    """The normalised and activated x, of which only x is kept, and its statistics."""
    x = channels_last(x)
    statistics, factors = measured(x, norm)
    y = _Normalised.apply(x, norm.weight, norm.bias, factors, norm.activation, norm.over_ranks)
    return cast(Tensor, y), statistics


def batch_norm_fixed(x: Tensor, norm: Norm, mean: Tensor, var: Tensor) -> Tensor:
    """With given statistics, in one pass, without gradients."""
    if torch.is_grad_enabled():
        return NotImplemented  # type: ignore[no-any-return]
    fixed = coefficients(norm.weight, norm.bias, torch.stack([mean, var]), norm.eps)
    return _normalised(channels_last(x), fixed, norm.activation, x.dtype)


def batch_norm_convolution(
    x: Tensor, norm: Norm, kernel: Tensor, kernel_bias: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Statistics]:
    """convolve(batch_norm(x)), of which only x is kept, and x's statistics."""
    x = channels_last(x)
    statistics, factors = measured(x, norm)
    scales = (norm.weight, norm.bias, factors, norm.activation, norm.over_ranks)
    return cast(Tensor, _Convolved.apply(x, *scales, for_autocast(kernel), kernel_bias, geometry)), statistics


@torch.no_grad()
def measured(x: Tensor, norm: Norm) -> tuple[Statistics, Tensor]:
    """The statistics of x (B, C, H, W), channels-last, over B, H, W and, as a rule, ranks; and their `coefficients`."""
    if norm.statistics is None and norm.over_ranks and world_size() > 1:
        return _of_shares(summed(_shares(x, world_size())), norm.weight, norm.bias, norm.eps)
    statistics = _moments(x) if norm.statistics is None else norm.statistics
    return statistics, coefficients(norm.weight, norm.bias, statistics, norm.eps)


# ------------------------------------------------------------------------------------------------- through autograd


class _Normalised(torch.autograd.Function):
    """act(γ (x − mean)/sqrt(var + eps) + β), with mean and var those of x over B, H, W and ranks, in the `coefficients`
    of the norm. Keeps only x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: Tensor,
        activation: Activation,
        over_ranks: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, norm)
        ctx.activation, ctx.over_ranks = activation, over_ranks
        return _normalised(x, norm, activation, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm = ctx.saved_tensors
        grad = channels_last(grads[0])
        _, gradients = _backward(x, grad, norm, ctx.activation, ctx.over_ranks, again=False)
        return *gradients, None, None, None


class _Convolved(torch.autograd.Function):
    """convolve(act(γ (x − mean)/sqrt(var + eps) + β)), otherwise as `_Normalised`. Keeps only x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: Tensor,
        activation: Activation,
        over_ranks: bool,
        kernel: Tensor,
        kernel_bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, norm, kernel, kernel_bias)
        ctx.activation, ctx.over_ranks, ctx.geometry = activation, over_ranks, geometry
        return convolve(_normalised(x, norm, activation, kernel.dtype), kernel, kernel_bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, kernel, kernel_bias = ctx.saved_tensors
        grad = channels_last(grads[0])
        y_grad = input_gradient(grad, x, kernel, ctx.geometry)
        y, gradients = _backward(x, y_grad, norm, ctx.activation, ctx.over_ranks, again=True)
        assert y is not None
        kernel_grad, kernel_bias_grad = parameter_gradients(grad, y, kernel, kernel_bias, ctx.geometry)
        return *gradients, None, None, None, kernel_grad, kernel_bias_grad, None


def _backward(
    x: Tensor, y_grad: Tensor, norm: Tensor, activation: Activation, over_ranks: bool, *, again: bool
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """The activated output where wanted `again`, and the gradients of (x, γ, β).

    The gradients of γ and β are this rank's; their mean over ranks is what x's gradient needs.
    """
    count = x.numel() // x.shape[1] * (world_size() if over_ranks else 1)
    y, u_grad, sums, means = _activation_backward(x, y_grad, norm, activation, again, count)
    if over_ranks:
        means = summed(means)
    x_grad = _input_gradient(x, y_grad if u_grad is None else u_grad, norm, means)
    return y, (x_grad, sums[1], sums[0])


# ------------------------------------------------------------------------------------------------ passes over memory
# Sums run along a row of pixels first, then over rows: what is partly summed stays in registers and the nearest cache.


@fused(dynamic=True)
def _moments(x: Tensor) -> Tensor:
    """Mean and biased variance (2, C). Sums are of distances to the mean of one row of pixels, lest they cancel."""
    start = at_least_float32(x[0, :, 0]).mean(1)
    distance = at_least_float32(x) - start[:, None, None]
    count = x.shape[0] * x.shape[2] * x.shape[3]
    first = distance.sum(3).sum((0, 2)) / count
    second = distance.square().sum(3).sum((0, 2)) / count
    return torch.stack([start + first, (second - first.square()).clamp(min=0)])


@fused(dynamic=True)
def _shares(x: Tensor, ranks: int) -> Tensor:
    """What a rank's x adds to the mean of x and of x² over all ranks' (2, C), in float64: E[x²] − E[x]² cancels."""
    mean, var = _moments(x).double()
    return torch.stack([mean, var + mean.square()]) / ranks


@fused(dynamic=True, few=True)
def _of_shares(shares: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Statistics, Tensor]:
    """The statistics of all ranks' shares together, and their `coefficients`."""
    mean, square = shares
    statistics = torch.stack([mean, square - mean.square()]).to(weight.dtype)
    return statistics, coefficients(weight, bias, statistics, eps)


@fused(dynamic=True, few=True)
def coefficients(weight: Tensor, bias: Tensor, moments: Tensor, eps: float) -> Tensor:
    """(4, C): mean, γ/σ, β, 1/σ."""
    mean, var = moments
    scale = torch.rsqrt(var + eps)
    return torch.stack([mean, scale * weight, bias, scale])


@fused(dynamic=True)
def _normalised(x: Tensor, norm: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    """act(γ x̂ + β) in a type of its own."""
    mean, gain, bias, _ = norm[:, :, None, None]
    return in_a_pass(activation, (at_least_float32(x) - mean) * gain + bias).to(dtype)


@fused(dynamic=True)
def _activation_backward(
    x: Tensor, y_grad: Tensor, norm: Tensor, activation: Activation, again: bool, count: int
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The activated output y where wanted `again`; the gradient of the activation's input u, if it is not that of y;
    (2, C): the sum of that gradient, and of its product with x̂; and both over `count`.

    The sums are over what is kept, as it is kept: they come from a second pass that computes no activation again.
    """
    mean, gain, bias, _ = norm[:, :, None, None]
    centred = at_least_float32(x) - mean
    y, slope = with_slope(activation, centred * gain + bias)
    kept = y_grad if activation == "identity" else (at_least_float32(y_grad) * slope).to(y_grad.dtype)
    u_grad = at_least_float32(kept)
    product_sum = (u_grad * centred).sum(3).sum((0, 2)) * norm[3]
    sums = torch.stack([u_grad.sum(3).sum((0, 2)), product_sum])
    return y.to(y_grad.dtype) if again else None, None if activation == "identity" else kept, sums, sums / count


@fused(dynamic=True)
def _input_gradient(x: Tensor, u_grad: Tensor, norm: Tensor, means: Tensor) -> Tensor:
    """γ/σ · (u_grad − its mean − x̂ · mean of its product with x̂)."""
    mean, gain, _, scale = norm[:, :, None, None]
    grad_mean, product_mean = means[:, :, None, None]
    centred = at_least_float32(u_grad) - grad_mean - (at_least_float32(x) - mean) * (scale * product_mean)
    x_grad: Tensor = centred * gain
    return x_grad.to(x.dtype)
