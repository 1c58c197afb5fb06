"""Convolutions, their gradients, and the effective (normalised, masked) weights they use (spec §1; Salimans & Kingma
2016).

A convolution stores raw parameters; what it multiplies with is its *effective* weight. `EffectiveWeights` makes the
effective weights of a whole model in one pass per step, batched by shape, hands each convolution its own, and keeps
the batches for the spectral regulariser. In evaluation they are made once and reused until a parameter changes.

Shapes: B batch, C channels, H W space; O outputs, R = C/groups · kh · kw of a kernel; N convolutions of one shape.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.precision import at_least_float32
from ..kernels import depthwise
from ..kernels.activations import Activation, in_a_pass, with_slope
from ..kernels.fusion import fused


def weight_norm(weight: Tensor, log_gain: Tensor) -> Tensor:
    """exp(g) · v / (‖v‖₂ + 1e-5), the norm over the last axis (spec §1). weight (…, O, R), log_gain (…, O, 1)."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return log_gain.exp() * weight / (norm + 1e-5)


# ------------------------------------------------------------------------------------- a convolution and its gradients


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


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """(B, C, H, W), weight (O, C/groups, kh, kw) -> (B, O, h, w); differentiable, and aware of autocast."""
    if geometry.enlarge:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    if geometry.is_depthwise(weight):
        return depthwise.depthwise_conv2d(x, weight, geometry.stride, bias)
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def convolve_activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: Activation
) -> Tensor:
    """convolve(act(x)), of which only x is kept for the backward pass."""
    if activation == "identity":
        return convolve(x, weight, bias, geometry)
    x = x.contiguous(memory_format=torch.channels_last)
    if not torch.is_grad_enabled():
        weight = for_autocast(weight)
        return convolve(_activated(x, activation, weight.dtype), weight, bias, geometry)
    return cast(Tensor, _OfActivated.apply(x, for_autocast(weight), bias, geometry, activation))


FEW_PIXELS = 2**12
"""Up to so many in a batch, a product of matrices makes the weight gradient of a 1×1 kernel faster than PyTorch's."""


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of `convolve`'s x (of which only shape and type count), from that of its result."""
    if geometry.is_pointwise(weight):
        return (grad.permute(0, 2, 3, 1) @ weight.flatten(1)).permute(0, 3, 1, 2)
    if geometry.enlarge:
        batch, channels, height, width = x.shape
        shape = (batch, channels, 2 * height, 2 * width)
        x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    if geometry.is_depthwise(weight):
        x_grad = depthwise.input_gradient(grad, weight, (x.shape[2], x.shape[3]), geometry.stride)
    else:
        x_grad = _torch_gradients(
            grad, torch.empty_like(x, dtype=grad.dtype), weight, None, geometry, (True, False, False)
        )[0]
    return F.avg_pool2d(x_grad, 2, divisor_override=1) if geometry.enlarge else x_grad


def parameter_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `convolve`'s weight and bias, in their types."""
    if geometry.enlarge:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    if geometry.is_depthwise(weight):
        weight_grad = depthwise.weight_gradient(grad, x, weight.shape[2], geometry.stride).to(weight.dtype)
    elif geometry.is_pointwise(weight) and grad.numel() <= FEW_PIXELS * grad.shape[1]:
        by_pixel = [tensor.permute(0, 2, 3, 1).flatten(0, 2) for tensor in (grad, x)]  # (B·H·W, O), (B·H·W, C)
        weight_grad = (by_pixel[0].t() @ by_pixel[1]).reshape(weight.shape)
    else:
        _, weight_grad, bias_grad = _torch_gradients(grad, x, weight, bias, geometry, (False, True, bias is not None))
        return weight_grad, None if bias is None else bias_grad.to(bias.dtype)
    return weight_grad, None if bias is None else grad.sum((0, 2, 3)).to(bias.dtype)


def _torch_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own gradients of (x, weight, bias), those that are wanted."""
    stride, padding, dilation, groups, _ = geometry
    gradients = torch.ops.aten.convolution_backward(
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


@fused(dynamic=True)
def _activated(x: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    return in_a_pass(activation, at_least_float32(x)).to(dtype)


@fused(dynamic=True)
def _activation_backward(x: Tensor, y_grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """act(x) in the type of its gradient, and the gradient of x."""
    y, slope = with_slope(activation, at_least_float32(x))
    return y.to(y_grad.dtype), (at_least_float32(y_grad) * slope).to(x.dtype)


# ------------------------------------------------------------------------------------------------------- the module


class Conv2d(nn.Module):
    """A convolution that keeps H and W at stride 1 (odd kernel, zero padding), weight-normalised unless told otherwise.

    `mask` (broadcastable to the kernel) removes connections; the norm is taken of what remains. `initial_gain` scales
    the starting output of a weight-normalised convolution. `enlarge` reads the input enlarged ×2 (nearest).
    """

    mask: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        normalised: bool = True,
        mask: Tensor | None = None,
        initial_gain: float = 1.0,
        enlarge: bool = False,
    ) -> None:
        super().__init__()
        assert kernel_size % 2 == 1
        self.geometry = Geometry(stride, kernel_size // 2 * dilation, dilation, groups, enlarge)
        self.normalised = normalised
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.register_buffer("mask", None if mask is None else mask.expand(self.weight.shape).clone(), persistent=False)
        self._initialise_like_torch()
        if normalised:
            norm = self.masked_matrix().norm(dim=1).reshape(-1, 1, 1, 1)
            self.log_gain = nn.Parameter((norm + 1e-2).log().detach() + math.log(initial_gain))
        self._effective: Tensor | None = None

    def _initialise_like_torch(self) -> None:
        """PyTorch's own Conv2d start: uniform in ± 1/sqrt(R) for the kernel and the bias."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def masked_matrix(self) -> Tensor:
        """The raw kernel without masked connections, (O, R)."""
        weight = self.weight if self.mask is None else self.weight * self.mask
        return weight.flatten(1)

    def effective_weight(self) -> Tensor:
        """The kernel (O, C/groups, kh, kw) this convolution multiplies with."""
        if self._effective is not None:
            return self._effective
        matrix = self.masked_matrix()
        if self.normalised:
            matrix = weight_norm(matrix, self.log_gain.flatten(1))
        return matrix.reshape(self.weight.shape)

    def forward(self, x: Tensor, activation: Activation = "identity") -> Tensor:
        """The convolution of act(x): (B, C, H, W) -> (B, O, H/stride, W/stride), twice that with `enlarge`.

        Only x is kept for the backward pass.
        """
        return convolve_activated(x, self.effective_weight(), self.bias, self.geometry, activation)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry parameters only: an effective weight belongs to one graph."""
        return {**self.__dict__, "_effective": None}

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, {self.geometry}"


class EffectiveWeights:
    """The effective weights of all convolutions of a model, made in one pass and shared by all who need them.

    `matrices` maps a kernel shape to (N, O, R), float32, with gradient; the N convolutions of that shape are in
    `convolutions` under the same key. R runs over (kh, kw, C/groups): kernels are channels-last without a copy.
    Convolutions inside a module of the kinds `besides` look after themselves.
    """

    def __init__(self, model: nn.Module, besides: tuple[type[nn.Module], ...] = ()) -> None:
        self.convolutions: dict[str, list[Conv2d]] = {}
        for convolution in _convolutions_in(model, besides):
            self.convolutions.setdefault(self._key(convolution), []).append(convolution)
        self.matrices: dict[str, Tensor] = {}
        self._made_for: tuple[Any, ...] | None = None

    @staticmethod
    def _key(convolution: Conv2d) -> str:
        kind = ("n" if convolution.normalised else "p") + ("" if convolution.mask is None else "m")
        return "x".join(map(str, convolution.weight.shape)) + kind

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(N, O) of each batch of matrices."""
        return {key: (len(group), group[0].weight.shape[0]) for key, group in self.convolutions.items()}

    def refresh(self) -> None:
        """Makes the effective weights anew; without gradients only if a parameter has changed since the last time."""
        state = None if torch.is_grad_enabled() else self._state()
        if state is not None and state == self._made_for:
            return
        self._made_for = state
        for key, convolutions in self.convolutions.items():
            matrix = self.matrices[key] = self._stack(convolutions)
            used = for_autocast(matrix)
            outputs, inputs, *size = convolutions[0].weight.shape
            kernels = used.reshape(-1, outputs, *size, inputs).permute(0, 1, 4, 2, 3)
            for convolution, kernel in zip(convolutions, kernels.unbind(), strict=True):
                convolution._effective = kernel

    def clear(self) -> None:
        """Forgets them: each convolution makes its own at every use, until the next refresh."""
        self.matrices, self._made_for = {}, None
        for convolution in self._all():
            convolution._effective = None

    @staticmethod
    def _stack(convolutions: list[Conv2d]) -> Tensor:
        matrix = _rows(torch.stack([convolution.weight for convolution in convolutions]))  # (N, O, R)
        if convolutions[0].mask is not None:
            matrix = matrix * _rows(torch.stack([c.mask for c in convolutions if c.mask is not None]))
        if convolutions[0].normalised:
            gains = torch.stack([convolution.log_gain for convolution in convolutions]).flatten(2)  # (N, O, 1)
            matrix = weight_norm(matrix, gains)
        return matrix

    def _all(self) -> Iterable[Conv2d]:
        return (convolution for group in self.convolutions.values() for convolution in group)

    def _state(self) -> tuple[Any, ...]:
        """What the effective weights depend on: each parameter's place and version, and autocast's type."""
        parameters = [p for c in self._all() for p in (c.weight, getattr(c, "log_gain", None)) if p is not None]
        if not parameters:
            return ()
        kind = parameters[0].device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (precision, *((parameter.data_ptr(), parameter._version) for parameter in parameters))

    def __getstate__(self) -> dict[str, Any]:
        return {"convolutions": self.convolutions, "matrices": {}, "_made_for": None}


def _convolutions_in(module: nn.Module, besides: tuple[type[nn.Module], ...]) -> Iterator[Conv2d]:
    for part in module.children():
        if isinstance(part, Conv2d):
            yield part
        elif not isinstance(part, besides):
            yield from _convolutions_in(part, besides)


def _rows(kernels: Tensor) -> Tensor:
    """(N, O, C/groups, kh, kw) -> (N, O, kh · kw · C/groups)."""
    return kernels.permute(0, 1, 3, 4, 2).flatten(2)


def for_autocast(tensor: Tensor) -> Tensor:
    """The tensor in autocast's type where autocast is on: cast once for all who use it, where each would cast it."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor
