"""Batch norm with its activation in as few passes over memory as there can be, alone or carried through a convolution.

Forward: one pass measures, one normalises and activates. Backward: one pass makes sums, one the gradient of x and,
where a convolution's kernel needs it, the activated input again. Only x is kept.

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
    fixed = coefficients(norm.weight, mean, var, norm.eps)
    return _normalised(channels_last(x), fixed, norm.bias, norm.activation, x.dtype)


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
        return _of_shares(summed(_shares(x, world_size())), norm.weight, norm.eps)
    if norm.statistics is not None:
        mean, var = norm.statistics
        return norm.statistics, coefficients(norm.weight, mean, var, norm.eps)
    return _measured(x, norm.weight, norm.eps)


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
        ctx.save_for_backward(x, norm, bias)
        ctx.activation, ctx.over_ranks = activation, over_ranks
        return _normalised(x, norm, bias, activation, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, bias = ctx.saved_tensors
        grad = channels_last(grads[0])
        _, gradients = _backward(x, grad, norm, bias, ctx.activation, ctx.over_ranks, again=False)
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
        ctx.save_for_backward(x, norm, bias, kernel, kernel_bias)
        ctx.activation, ctx.over_ranks, ctx.geometry = activation, over_ranks, geometry
        return convolve(_normalised(x, norm, bias, activation, kernel.dtype), kernel, kernel_bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, bias, kernel, kernel_bias = ctx.saved_tensors
        grad = channels_last(grads[0])
        y_grad = input_gradient(grad, x, kernel, ctx.geometry)
        y, gradients = _backward(x, y_grad, norm, bias, ctx.activation, ctx.over_ranks, again=True)
        assert y is not None
        kernel_grad, kernel_bias_grad = parameter_gradients(grad, y, kernel, kernel_bias, ctx.geometry)
        return *gradients, None, None, None, kernel_grad, kernel_bias_grad, None


def _backward(
    x: Tensor, y_grad: Tensor, norm: Tensor, bias: Tensor, activation: Activation, over_ranks: bool, *, again: bool
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """The activated output where wanted `again`, and the gradients of (x, γ, β).

    The gradients of γ and β are this rank's; their mean over ranks is what x's gradient needs.
    """
    count = x.numel() // x.shape[1] * (world_size() if over_ranks else 1)
    if for_a_gpu(x):
        sums, means = _gradient_sums(x, y_grad, norm, bias, activation, count)
        means = summed(means) if over_ranks else means
        x_grad, y = _gradient_and_activation(x, y_grad, norm, bias, means, activation, again)
    else:
        y, kept, sums, means = _activation_backward(x, y_grad, norm, bias, activation, again, count)
        means = summed(means) if over_ranks else means
        x_grad = _input_gradient(x, y_grad if kept is None else kept, norm, means)
    return y, (x_grad, sums[1], sums[0])


# ------------------------------------------------------------------------------------------------ passes over memory
# What a pass stacks it does not read again: it would have to be in memory first, by a kernel more.
# On a CPU exponentials cost more than memory does: the slope of an activation is computed once and kept between the two
# passes of the backward pass. On a GPU it is computed twice, in registers.


def for_a_gpu(x: Tensor) -> bool:
    """Which of the two divisions of work an input takes."""
    return x.is_cuda


def sum_of_pixels(u: Tensor, *others: int) -> Tensor:
    """Over H, W and `others`. On a CPU along rows of pixels first: what is partly summed stays in registers and the
    nearest cache. On a GPU at once, in as many parts as there are processors."""
    return u.sum((*others, 2, 3)) if for_a_gpu(u) else u.sum(3).sum((*others, 2))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C). On a CPU, sums are of distances to the mean of one row of pixels, lest they
    cancel."""
    if for_a_gpu(x):
        var, mean = torch.var_mean(at_least_float32(x), (0, 2, 3), correction=0)
        return mean, var
    start = at_least_float32(x[0, :, 0]).mean(1)
    distance = at_least_float32(x) - start[:, None, None]
    count = x.shape[0] * x.shape[2] * x.shape[3]
    first, second = sum_of_pixels(distance, 0) / count, sum_of_pixels(distance.square(), 0) / count
    return start + first, (second - first.square()).clamp(min=0)


@fused(dynamic=True)
def _measured(x: Tensor, weight: Tensor, eps: float) -> tuple[Statistics, Tensor]:
    """Mean and biased variance (2, C), and their `coefficients`."""
    mean, var = (moment.to(weight.dtype) for moment in _moments(x))
    return torch.stack([mean, var]), coefficients(weight, mean, var, eps)


@fused(dynamic=True)
def _shares(x: Tensor, ranks: int) -> Tensor:
    """What a rank's x adds to the mean of x and of x² over all ranks' (2, C), in float64: E[x²] − E[x]² cancels."""
    mean, var = (moment.double() for moment in _moments(x))
    return torch.stack([mean / ranks, (var + mean.square()) / ranks])


@fused(dynamic=True, few=True)
def _of_shares(shares: Tensor, weight: Tensor, eps: float) -> tuple[Statistics, Tensor]:
    """The statistics of all ranks' shares together, and their `coefficients`."""
    mean, square = shares
    mean, var = mean.to(weight.dtype), (square - mean.square()).to(weight.dtype)
    return torch.stack([mean, var]), coefficients(weight, mean, var, eps)


@fused(dynamic=True, few=True)
def coefficients(weight: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(3, C): mean, γ/σ, 1/σ."""
    scale = torch.rsqrt(var + eps)
    return torch.stack([mean, scale * weight, scale])


@fused(dynamic=True)
def _normalised(x: Tensor, norm: Tensor, bias: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    """act(γ x̂ + β) in a type of its own."""
    mean, gain, _ = norm[:, :, None, None]
    return in_a_pass(activation, (at_least_float32(x) - mean) * gain + bias[:, None, None]).to(dtype)


@fused(dynamic=True)
def _activation_backward(
    x: Tensor, y_grad: Tensor, norm: Tensor, bias: Tensor, activation: Activation, again: bool, count: int
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The activated output y where wanted `again`; the gradient of the activation's input u, if it is not that of y;
    and the `_gradient_sums`, over what is kept, as it is kept: in a second pass that computes no activation again."""
    y, u_grad = _through_activation(x, y_grad, norm, bias, activation)
    sums = _sums_of(x, u_grad, norm, count)
    return y.to(y_grad.dtype) if again else None, None if activation == "identity" else u_grad, *sums


@fused(dynamic=True)
def _gradient_sums(
    x: Tensor, y_grad: Tensor, norm: Tensor, bias: Tensor, activation: Activation, count: int
) -> tuple[Tensor, Tensor]:
    """(2, C): the sum of the gradient of the activation's input, and of its product with x̂; and both over `count`."""
    return _sums_of(x, _through_activation(x, y_grad, norm, bias, activation)[1], norm, count)


@fused(dynamic=True)
def _gradient_and_activation(
    x: Tensor, y_grad: Tensor, norm: Tensor, bias: Tensor, means: Tensor, activation: Activation, again: bool
) -> tuple[Tensor, Tensor | None]:
    """The `_input_gradient`, and the activated output where wanted `again`."""
    y, u_grad = _through_activation(x, y_grad, norm, bias, activation)
    return _input_gradient(x, u_grad, norm, means), y.to(y_grad.dtype) if again else None


def _through_activation(
    x: Tensor, y_grad: Tensor, norm: Tensor, bias: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """The activated output y, float32 or more, and the gradient of the activation's input, in the type of y's."""
    mean, gain, _ = norm[:, :, None, None]
    y, slope = with_slope(activation, (at_least_float32(x) - mean) * gain + bias[:, None, None])
    return y, y_grad if activation == "identity" else (at_least_float32(y_grad) * slope).to(y_grad.dtype)


def _sums_of(x: Tensor, u_grad: Tensor, norm: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(2, C): Σ u_grad and Σ u_grad · x̂; and both over `count`."""
    wide = at_least_float32(u_grad)
    products = wide * (at_least_float32(x) - norm[0, :, None, None])
    plain, product = sum_of_pixels(wide, 0), sum_of_pixels(products, 0) * norm[2]
    return torch.stack([plain, product]), torch.stack([plain / count, product / count])


@fused(dynamic=True)
def _input_gradient(x: Tensor, u_grad: Tensor, norm: Tensor, means: Tensor) -> Tensor:
    """γ/σ · (u_grad − its mean − x̂ · mean of its product with x̂)."""
    mean, gain, scale = norm[:, :, None, None]
    grad_mean, product_mean = means[:, :, None, None]
    centred = at_least_float32(u_grad) - grad_mean - (at_least_float32(x) - mean) * (scale * product_mean)
    x_grad: Tensor = centred * gain
    return x_grad.to(x.dtype)
