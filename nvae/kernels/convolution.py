"""A convolution of an activated input, of which only the input is kept; and the gradients of convolutions.

Convolutions are of three kinds, each with its way to compute it and its gradients: depthwise ones, products of each
pixel's channels with one matrix, and all others.

Shapes: B batch, C channels, H W space; O outputs; kh kw of a kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.precision import at_least_float32
from . import depthwise
from .activations import ACTIVATIONS, Activation, in_a_pass, with_slope
from .fusion import WORTH_COMPILING, fused

FEW_PIXELS = 2**12
"""Up to so many in a batch, a product of matrices makes the weight gradient of a 1×1 kernel faster than PyTorch's."""
OPERATORS: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "swish": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
}
"""Activations that are one operator of PyTorch, as fast as a pass of ours, to the operator of their gradient."""


class Geometry(NamedTuple):
    """How a kernel moves over its input; `enlarge` reads the input enlarged ×2 (nearest)."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    enlarge: bool = False

    def is_depthwise(self, weight: Tensor) -> bool:
        """One input and one output channel per group: the operator of nvae/kernels/depthwise.py does it."""
        return self.groups == weight.shape[0] > 1 and weight.shape[1] == 1 and self.dilation == 1

    def is_pointwise(self, weight: Tensor) -> bool:
        """A product of each pixel's channels with one matrix."""
        return weight.shape[2:] == (1, 1) and self.groups == self.stride == 1 and not self.enlarge


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: Activation = "identity"
) -> Tensor:
    """convolve(act(x)), of which only x is kept for the backward pass."""
    if activation == "identity":
        return convolve(x, weight, bias, geometry)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = for_autocast(weight)
    if not torch.is_grad_enabled():
        return convolve(_activated(x, activation, weight.dtype), weight, bias, geometry)
    return cast(Tensor, _OfActivated.apply(x, weight, bias, geometry, activation))


def for_autocast(tensor: Tensor) -> Tensor:
    """The tensor in autocast's type where autocast is on: cast once for all who use it, where each would cast it."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


# --------------------------------------------------------------------------------------------- a convolution by kind


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """(B, C, H, W), weight (O, C/groups, kh, kw) -> (B, O, h, w); differentiable, and aware of autocast."""
    if geometry.enlarge:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    return kind_of(weight, geometry).forward(x, weight, bias, geometry)


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of `convolve`'s x (of which only shape and type count), from that of its result."""
    batch, channels, height, width = x.shape
    if not geometry.enlarge:
        return kind_of(weight, geometry).input_gradient(grad, x, weight, geometry)
    shape = (batch, channels, 2 * height, 2 * width)
    large = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    large_grad = kind_of(weight, geometry).input_gradient(grad, large, weight, geometry)
    return F.avg_pool2d(large_grad, 2, divisor_override=1)


def parameter_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `convolve`'s weight and bias, in their types."""
    if geometry.enlarge:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    return kind_of(weight, geometry).parameter_gradients(grad, x, weight, bias, geometry)


class Kind(Protocol):
    """How convolutions of a kind are computed; what is read enlarged is enlarged already."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """(B, C, H, W) -> (B, O, h, w)."""

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """As x, of which only shape and type count."""

    def parameter_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, Tensor | None]:
        """Of weight and bias, in their types."""


class General:
    """PyTorch's."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """(B, C, H, W) -> (B, O, h, w)."""
        return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """As x."""
        like = torch.empty_like(x, dtype=grad.dtype)
        return _torch_gradients(grad, like, weight, None, geometry, (True, False, False))[0]

    def parameter_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, Tensor | None]:
        """Of weight and bias."""
        wanted = (False, True, bias is not None)
        _, weight_grad, bias_grad = _torch_gradients(grad, x, weight, bias, geometry, wanted)
        return weight_grad, None if bias is None else bias_grad.to(bias.dtype)


class Pointwise(General):
    """Gradients as products of matrices, with pixels as rows; on a CPU autograd takes them so, too."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)."""
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x, weight, bias, geometry)
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """As x."""
        return (grad.permute(0, 2, 3, 1) @ weight.flatten(1)).permute(0, 3, 1, 2)

    def parameter_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, Tensor | None]:
        """Of weight and bias."""
        if grad.numel() > FEW_PIXELS * grad.shape[1]:
            return super().parameter_gradients(grad, x, weight, bias, geometry)
        by_pixel = [tensor.permute(0, 2, 3, 1).flatten(0, 2) for tensor in (grad, x)]  # (B·H·W, O), (B·H·W, C)
        return (by_pixel[0].t() @ by_pixel[1]).reshape(weight.shape), _bias_gradient(grad, bias)


class Depthwise:
    """The operators of nvae/kernels/depthwise.py."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """(B, C, H, W) -> (B, C, h, w)."""
        return depthwise.depthwise_conv2d(x, weight, geometry.stride, bias)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """As x."""
        return depthwise.input_gradient(grad, weight, (x.shape[2], x.shape[3]), geometry.stride)

    def parameter_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, Tensor | None]:
        """Of weight and bias."""
        weight_grad = depthwise.weight_gradient(grad, x, weight.shape[2], geometry.stride)
        return weight_grad.to(weight.dtype), _bias_gradient(grad, bias)


GENERAL, POINTWISE, DEPTHWISE = General(), Pointwise(), Depthwise()


def kind_of(weight: Tensor, geometry: Geometry) -> Kind:
    """The kind of a convolution."""
    if geometry.is_depthwise(weight):
        return DEPTHWISE
    return POINTWISE if geometry.is_pointwise(weight) else GENERAL


def _bias_gradient(grad: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else grad.sum((0, 2, 3)).to(bias.dtype)


def _torch_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own gradients of (x, weight, bias), those that are wanted."""
    stride, padding, dilation, groups, _ = geometry
    gradients = torch.ops.aten.convolution_backward.default(
        grad,
        x,
        weight,
        None if bias is None else list(bias.shape),
        [stride, stride],
        [padding, padding],
        [dilation, dilation],
        False,
        [0, 0],
        groups,
        wanted,
    )
    return cast(tuple[Tensor, Tensor, Tensor], gradients)


# ------------------------------------------------------------------------------------------------- through autograd


class _OfActivated(torch.autograd.Function):
    """convolve(act(x)), of which only x is kept: the backward pass makes act(x) again together with its slope."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: Activation
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.geometry, ctx.activation = geometry, activation
        return convolve(_activated(x, activation, weight.dtype), weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        y_grad = input_gradient(grad, x, weight, ctx.geometry)
        y, x_grad = _activation_backward(x, y_grad, ctx.activation)
        weight_grad, bias_grad = parameter_gradients(grad, y, weight, bias, ctx.geometry)
        return x_grad, weight_grad, bias_grad, None, None


def _activated(x: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    """act(x) in a type; where PyTorch has one operator for that, by it."""
    if x.dtype == dtype and activation in OPERATORS:
        return ACTIVATIONS[activation](x)
    return _activated_and_cast(x, activation, dtype)


@fused(dynamic=True)
def _activated_and_cast(x: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    return in_a_pass(activation, at_least_float32(x)).to(dtype)


def _activation_backward(x: Tensor, y_grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """act(x) in the type of its gradient, and the gradient of x; of few numbers by two operators, not one pass."""
    if x.dtype == y_grad.dtype and x.numel() < WORTH_COMPILING and activation in OPERATORS:
        return ACTIVATIONS[activation](x), OPERATORS[activation](y_grad, x)
    return _activation_with_gradient(x, y_grad, activation)


@fused(dynamic=True)
def _activation_with_gradient(x: Tensor, y_grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    y, slope = with_slope(activation, at_least_float32(x))
    return y.to(y_grad.dtype), (at_least_float32(y_grad) * slope).to(x.dtype)
