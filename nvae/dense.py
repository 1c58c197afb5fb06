"""Dense convolutions of bfloat16 tensors on CPUs that nvae/bfloat16.py is about, with their gradients, in C++.

Everywhere else, and for other geometries, `takes` says no and PyTorch's convolutions are used.

The result has the input's size: a kernel's first tap is `before` = (rows, columns) before the result's pixel, as a rule
half of the kernel. The operators are opaque to `torch.compile`.

Shapes: B batch, C channels, H W space; O outputs; kh kw of a kernel.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bfloat16
from .fusion import watched
from .native import addresses, channels_last, made_from, structure

SOURCE = Path(__file__).parent / "kernels" / "dense.cpp"

_SIZES = "images height width inputs outputs rows columns top left dilation"
_Dense = structure("Dense", f"{_SIZES} turned threads", "", "x weight bias out")
_DenseGradients = structure("DenseGradients", f"{_SIZES} threads", "", "grad x weight bias")


def takes(x: Tensor, weight: Tensor, stride: int, groups: int) -> bool:
    """Whether the functions here compute such a convolution of x, cast by autocast where that is on."""
    if x.device.type != "cpu" or stride != 1 or groups != 1:
        return False
    on = torch.is_autocast_enabled("cpu")
    types = {torch.get_autocast_dtype("cpu")} if on else {x.dtype, weight.dtype}
    return types == {torch.bfloat16} and x.dtype != torch.float64 and bfloat16.pays(SOURCE)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1, before: tuple[int, int] | None = None
) -> Tensor:
    """(B, C, H, W), weight (O, C, kh, kw), bias (O) -> (B, O, H, W), bfloat16 whatever the types; differentiable."""
    x, weight = x.bfloat16(), weight.bfloat16()
    geometry = _geometry(weight.shape[2:], dilation, before)
    needed = torch.compiler.is_compiling() or torch.is_grad_enabled() or watched(x)
    found: Tensor = (forward_operator if needed else _forward)(x, weight, bias, geometry)
    return found


def input_gradient(grad: Tensor, weight: Tensor, dilation: int = 1, before: tuple[int, int] | None = None) -> Tensor:
    """The gradient of x, (B, C, H, W), from that of the result."""
    geometry = _geometry(weight.shape[2:], dilation, before)
    needed = torch.compiler.is_compiling() or watched(grad)
    found: Tensor = (input_gradient_operator if needed else _input_gradient)(grad, weight.bfloat16(), geometry)
    return found


def parameter_gradients(
    grad: Tensor,
    x: Tensor,
    size: Sequence[int],
    dilation: int = 1,
    before: tuple[int, int] | None = None,
    *,
    bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of weight (O, C, *size) and, if there is one, bias (O), float32, from that of the result."""
    geometry = _geometry(size, dilation, before)
    needed = torch.compiler.is_compiling() or watched(grad)
    function = parameter_gradients_operator if needed else _parameter_gradients
    found: tuple[Tensor, Tensor] = function(grad, x.bfloat16(), geometry, bias)
    return found


def _geometry(size: Sequence[int], dilation: int, before: tuple[int, int] | None) -> list[int]:
    """Rows and columns of a kernel, those before the result's pixel, and dilation."""
    return [*size, *(before or (side // 2 * dilation for side in size)), dilation]


# ----------------------------------------------------------------------------------------------------- the operators


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> Tensor:
    return _convolved(x, weight, bias, geometry, turned=False)


def _input_gradient(grad: Tensor, weight: Tensor, geometry: Sequence[int]) -> Tensor:
    return _convolved(grad.bfloat16(), weight, None, geometry, turned=True)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], *, turned: bool) -> Tensor:
    x, weight = channels_last(x), channels_last(weight)
    images, inputs, height, width = x.shape
    outputs = weight.shape[1 if turned else 0]
    assert weight.shape[0 if turned else 1] == inputs and list(weight.shape[2:]) == list(geometry[:2])
    assert x.dtype == weight.dtype == torch.bfloat16
    out = _empty_like(x, outputs)
    bias = None if bias is None else bias.detach().float().contiguous()
    integers = (images, height, width, inputs, outputs, *geometry, int(turned), torch.get_num_threads())
    pointers = addresses(x, weight, bias, out)
    made_from(SOURCE).dense(ctypes.byref(_Dense(*integers, *pointers)))
    return out


def _parameter_gradients(grad: Tensor, x: Tensor, geometry: Sequence[int], bias: bool) -> tuple[Tensor, Tensor]:
    grad, x = channels_last(grad.bfloat16()), channels_last(x)
    images, inputs, height, width = x.shape
    outputs = grad.shape[1]
    assert grad.shape == (images, outputs, height, width) and grad.dtype == x.dtype == torch.bfloat16
    weight_grad, bias_grad = _empty_gradients(grad, x, geometry, bias)
    integers = (images, height, width, inputs, outputs, *geometry, torch.get_num_threads())
    pointers = addresses(grad, x, weight_grad, bias_grad if bias else None)
    made_from(SOURCE).dense_gradients(ctypes.byref(_DenseGradients(*integers, *pointers)))
    return weight_grad, bias_grad


def _empty_like(x: Tensor, outputs: int) -> Tensor:
    batch, _, height, width = x.shape
    shape = (batch, outputs, height, width)
    return torch.empty(shape, dtype=torch.bfloat16, device=x.device, memory_format=torch.channels_last)


def _empty_gradients(grad: Tensor, x: Tensor, geometry: Sequence[int], bias: bool) -> tuple[Tensor, Tensor]:
    rows, columns, *_ = geometry
    outputs, inputs = grad.shape[1], x.shape[1]
    weight = torch.empty(outputs, rows, columns, inputs, device=x.device).permute(0, 3, 1, 2)
    return weight, torch.empty(outputs if bias else 0, device=x.device)


forward_operator = torch.library.custom_op("nvae::dense", _forward, mutates_args=())
input_gradient_operator = torch.library.custom_op("nvae::dense_input_gradient", _input_gradient, mutates_args=())
parameter_gradients_operator = torch.library.custom_op(
    "nvae::dense_parameter_gradients", _parameter_gradients, mutates_args=()
)


@forward_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> Tensor:
    return _empty_like(x, weight.shape[0])


@input_gradient_operator.register_fake
def _(grad: Tensor, weight: Tensor, geometry: Sequence[int]) -> Tensor:
    return _empty_like(grad, weight.shape[1])


@parameter_gradients_operator.register_fake
def _(grad: Tensor, x: Tensor, geometry: Sequence[int], bias: bool) -> tuple[Tensor, Tensor]:
    return _empty_gradients(grad, x, geometry, bias)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Sequence[int]], output: Tensor) -> None:
    x, weight, bias, ctx.geometry = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_type = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    *size, top, left, dilation = ctx.geometry
    x_grad = input_gradient(grad, weight, dilation, (top, left)) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:3]):
        return x_grad, None, None, None
    has_bias = ctx.bias_type is not None
    weight_grad, bias_grad = parameter_gradients(grad, x, size, dilation, (top, left), bias=has_bias)
    return x_grad, weight_grad.to(weight.dtype), bias_grad.to(ctx.bias_type) if has_bias else None, None


forward_operator.register_autograd(_gradients, setup_context=_keep)
