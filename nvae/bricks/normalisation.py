"""Batch norm with its activation, in as few passes over memory as there can be (spec §1; paper §3.4).

Forward: one pass measures, one normalises and activates. Backward: one pass makes the activated input again, its
slope and both sums; one makes the gradient of x. Only x is kept. `BatchNorm.into` carries this through a convolution.

Shapes: B batch, C channels, H W space.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.distributed import all_mean, world_size
from ..core.precision import at_least_float32
from ..kernels.activations import ACTIVATIONS, Activation, in_a_pass, with_slope
from ..kernels.fusion import fused
from .convolutions import Conv2d, Geometry, convolve, for_autocast, input_gradient, parameter_gradients

Statistics = Tensor
"""Mean and biased variance of a batch, (2, C), float32 or more."""


class BatchNorm(nn.Module):
    """Batch norm (eps 1e-5, momentum 0.05, statistics over all ranks), then an activation.

    The running variance is the unbiased one. `copies`: how many equal pixels of the published network each pixel
    stands for, where enlarging comes later here than there; only the unbiased variance depends on it.
    """

    eps, momentum = 1e-5, 0.05
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, activation: Activation = "identity", *, copies: int = 1) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.copies = copies
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self._statistics: Statistics | None = None
        self._replaying = False
        self._alone = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in the type of the input; statistics in float32."""
        if not (self.training or torch.is_grad_enabled()):
            x = x.contiguous(memory_format=torch.channels_last)
            fixed = coefficients(self.weight, self.bias, torch.stack([self.running_mean, self.running_var]), self.eps)
            return _normalised(x, fixed, self.activation, x.dtype)
        if not self.training:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return ACTIVATIONS[self.activation](y)
        x = x.contiguous(memory_format=torch.channels_last)
        statistics = self.batch_statistics(x)
        return cast(Tensor, _Normalised.apply(x, self.weight, self.bias, statistics, self.eps, self.activation))

    def into(self, convolution: Conv2d, x: Tensor) -> Tensor:
        """convolution(self(x)), keeping only x for the backward pass: (B, C, H, W) -> (B, O, H', W')."""
        if not self.training:
            return cast(Tensor, convolution(self(x)))
        x = x.contiguous(memory_format=torch.channels_last)
        norm = (self.weight, self.bias, self.batch_statistics(x), self.eps, self.activation)
        kernel = for_autocast(convolution.effective_weight())
        return cast(Tensor, _Convolved.apply(x, *norm, kernel, convolution.bias, convolution.geometry))

    def batch_statistics(self, x: Tensor) -> Statistics:
        """Those of x (B, C, H, W), channels-last: measured, or within `replaying` the recorded ones."""
        if not self._replaying:
            self._statistics = self._measure(x)
        assert self._statistics is not None
        return self._statistics

    @torch.no_grad()
    def _measure(self, x: Tensor) -> Statistics:
        """Over B, H, W and ranks; advances the running statistics."""
        moments = _moments(x)
        ranks, momentum = (1, 1.0) if self._alone else (world_size(), self.momentum)
        if ranks > 1:
            moments = _over_ranks(moments)
        mean, var = moments
        count = x.numel() // x.shape[1] * ranks * self.copies
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (count / max(count - 1, 1)), momentum)
        self.num_batches_tracked.add_(1)
        return moments

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_statistics": None}


def _over_ranks(moments: Tensor) -> Tensor:
    """Mean and variance over all ranks from each rank's; one collective, in float64 because E[x²] − E[x]² cancels."""
    mean, var = moments.double()
    mean, square = all_mean(torch.stack([mean, var + mean.square()]))
    return torch.stack([mean, square - mean.square()]).to(moments.dtype)


@contextmanager
def recording(modules: list[BatchNorm], statistics: list[Statistics]) -> Iterator[None]:
    """Leaves in `statistics` what each batch norm has measured within."""
    yield
    statistics.extend(module._statistics for module in modules if module._statistics is not None)


@contextmanager
def replaying(modules: list[BatchNorm], statistics: list[Statistics]) -> Iterator[None]:
    """Within, batch norms use recorded `statistics`: nothing advances, no collective is repeated."""
    for module, recorded in zip(modules, statistics, strict=True):
        module._statistics = recorded
        module._replaying = True
    try:
        yield
    finally:
        for module in modules:
            module._replaying = False


@contextmanager
def measuring(modules: list[BatchNorm]) -> Iterator[None]:
    """Within, running statistics are those of the last pass of this rank alone, no average over passes and ranks."""
    for module in modules:
        module._alone = True
    try:
        yield
    finally:
        for module in modules:
            module._alone = False


# ------------------------------------------------------------------------------------------------- through autograd


class _Normalised(torch.autograd.Function):
    """act(γ (x − mean)/sqrt(var + eps) + β), with mean and var those of x over B, H, W and ranks. Keeps only x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, eps: float, activation: Activation
    ) -> Tensor:
        norm = coefficients(weight, bias, moments, eps)
        ctx.save_for_backward(x, norm)
        ctx.activation = activation
        return _normalised(x, norm, activation, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        _, gradients = _backward(x, grad, norm, ctx.activation, again=False)
        return *gradients, None, None, None


class _Convolved(torch.autograd.Function):
    """convolve(act(γ (x − mean)/sqrt(var + eps) + β)), otherwise as `_Normalised`. Keeps only x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        moments: Tensor,
        eps: float,
        activation: Activation,
        kernel: Tensor,
        kernel_bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        norm = coefficients(weight, bias, moments, eps)
        ctx.save_for_backward(x, norm, kernel, kernel_bias)
        ctx.activation, ctx.geometry = activation, geometry
        return convolve(_normalised(x, norm, activation, kernel.dtype), kernel, kernel_bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, kernel, kernel_bias = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        y_grad = input_gradient(grad, x, kernel, ctx.geometry)
        y, gradients = _backward(x, y_grad, norm, ctx.activation, again=True)
        assert y is not None
        kernel_grad, kernel_bias_grad = parameter_gradients(grad, y, kernel, kernel_bias, ctx.geometry)
        return *gradients, None, None, None, kernel_grad, kernel_bias_grad, None


def coefficients(weight: Tensor, bias: Tensor, moments: Tensor, eps: float) -> Tensor:
    """(4, C): mean, γ/σ, β, 1/σ."""
    mean, var = moments
    scale = torch.rsqrt(var + eps)
    return torch.stack([mean, scale * weight, bias, scale])


def _backward(
    x: Tensor, y_grad: Tensor, norm: Tensor, activation: Activation, *, again: bool
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """The activated output where wanted `again`, and the gradients of (x, γ, β).

    The gradients of γ and β are this rank's; their mean over ranks is what x's gradient needs.
    """
    y, u_grad, sums = _activation_backward(x, y_grad, norm, activation, again)
    means = all_mean(sums) / (x.numel() // x.shape[1])
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
def _normalised(x: Tensor, norm: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    """act(γ x̂ + β) in a type of its own."""
    mean, gain, bias, _ = norm[:, :, None, None]
    return in_a_pass(activation, (at_least_float32(x) - mean) * gain + bias).to(dtype)


@fused(dynamic=True)
def _activation_backward(
    x: Tensor, y_grad: Tensor, norm: Tensor, activation: Activation, again: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The activated output y where wanted `again`; the gradient of the activation's input u, if it is not that of y;
    and (2, C): the sum of that gradient, and of its product with x̂.

    The sums are over what is kept, as it is kept: they come from a second pass that computes no activation again.
    """
    mean, gain, bias, _ = norm[:, :, None, None]
    centred = at_least_float32(x) - mean
    y, slope = with_slope(activation, centred * gain + bias)
    kept = y_grad if activation == "identity" else (at_least_float32(y_grad) * slope).to(y_grad.dtype)
    u_grad = at_least_float32(kept)
    product_sum = (u_grad * centred).sum(3).sum((0, 2)) * norm[3]
    sums = torch.stack([u_grad.sum(3).sum((0, 2)), product_sum])
    return y.to(y_grad.dtype) if again else None, None if activation == "identity" else kept, sums


@fused(dynamic=True)
def _input_gradient(x: Tensor, u_grad: Tensor, norm: Tensor, means: Tensor) -> Tensor:
    """γ/σ · (u_grad − its mean − x̂ · mean of its product with x̂)."""
    mean, gain, _, scale = norm[:, :, None, None]
    grad_mean, product_mean = means[:, :, None, None]
    centred = at_least_float32(u_grad) - grad_mean - (at_least_float32(x) - mean) * (scale * product_mean)
    x_grad: Tensor = centred * gain
    return x_grad.to(x.dtype)
