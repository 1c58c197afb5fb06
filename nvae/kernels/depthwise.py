"""Depthwise convolution as an operator of its own, with its gradients: fast where PyTorch's is not.

Memory is channels-last. On the CPU the forward pass is PyTorch's, the input gradient at stride 1 a forward pass with
the kernel turned round, and the weight gradient K·K shifted products summed in one pass (docs/performance.md). On CUDA
all three are Triton kernels (nvae/kernels/triton/depthwise.py). Elsewhere PyTorch's.

The operators are opaque to `torch.compile`: never traced into, never a graph break. Where nobody traces, watches or
differentiates, their functions are called without them.

Shapes: B batch, C channels, H W space of x, h w space of y = ceil(H/stride), K kernel side (odd), padding K // 2.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.precision import at_least_float32
from .fusion import compiles, fused, watched
from .native import channels_last

TAPS_PER_PASS = 25
"""How many taps of the weight gradient one pass sums: as many as accumulators fit into vector registers."""


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int = 1, bias: Tensor | None = None) -> Tensor:
    """(B, C, H, W), weight (C, 1, K, K), bias (C) -> (B, C, h, w), in autocast's type where autocast is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    return _run(_forward, forward_operator, x, weight, None if bias is None else bias.to(x.dtype), stride)


def input_gradient(grad: Tensor, weight: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """The gradient of x, (B, C, H, W) with `size` (H, W), from that of y."""
    return _run(_input_gradient, input_gradient_operator, grad, weight, *size, stride)


def weight_gradient(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    """The gradient of the kernel, (C, 1, size, size), float32 or more, from that of y."""
    return _run(_weight_gradient, weight_gradient_operator, grad, x, size, stride)


def _run(function: Callable[..., Tensor], operator: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """The operator's result, by its function alone where nobody needs the operator: no compiler, autograd, observer."""
    needed = torch.compiler.is_compiling() or torch.is_grad_enabled() or watched(x)
    return operator(x, *others) if needed else function(x, *others)


# ----------------------------------------------------------------------------------------------------- the operators


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    if _in_triton(x):
        from .triton import depthwise as kernels

        return kernels.forward(x, weight, bias, stride)
    return channels_last(_convolve(channels_last(x), weight, bias, stride))


def _input_gradient(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    shape = (*grad.shape[:2], height, width)
    if _in_triton(grad):
        from .triton import depthwise as kernels

        return kernels.input_gradient(grad, weight, shape, stride)
    if stride == 1:
        return channels_last(_convolve(channels_last(grad), weight.flip(2, 3), None, 1))
    # In float32 also for smaller types: PyTorch's own takes 80 times as long in bfloat16.
    wide, kernel = at_least_float32(channels_last(grad)), at_least_float32(weight)
    x = wide.new_empty(1).expand(shape)
    return channels_last(_backward(wide, x, kernel, stride, (True, False, False))[0].to(grad.dtype))


def _weight_gradient(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    if _in_triton(x):
        from .triton import depthwise as kernels

        return kernels.weight_gradient(grad, x, size, stride)
    grad, x = channels_last(grad), channels_last(x)
    if x.device.type == "cpu" and compiles("cpu"):
        rows = max(TAPS_PER_PASS // size, 1)  # of the kernel, in one pass
        passes = [range(first, min(first + rows, size)) for first in range(0, size, rows)]
        rows_x, rows_grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
        taps = torch.cat([_summed_taps(rows_x, rows_grad, size, stride, part.start, part.stop) for part in passes])
        return taps.t().reshape(-1, 1, size, size).contiguous()
    weight = x.new_empty(1).expand(x.shape[1], 1, size, size)
    return at_least_float32(_backward(grad, x, weight, stride, (False, True, False))[1])


@fused(dynamic=False)
def _summed_taps(x: Tensor, grad: Tensor, size: int, stride: int, first: int, end: int) -> Tensor:
    """Rows `first` to `end` of the kernel's gradient, (rows·K, C), from x (B, H, W, C) and grad (B, h, w, C).

    Sums over an image before it sums over images: partial sums are what a core keeps in registers.
    """
    height, width = grad.shape[1:3]
    pad = size // 2
    x = F.pad(x, (0, 0, pad, pad + stride, pad, pad + stride))
    wide = at_least_float32(grad)
    taps = []
    for i in range(first, end):
        for j in range(size):
            shifted = x[:, i : i + stride * height : stride, j : j + stride * width : stride]
            taps.append((at_least_float32(shifted) * wide).sum((1, 2)).sum(0))
    return torch.stack(taps)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    return F.conv2d(x, weight, bias, stride, weight.shape[2] // 2, 1, weight.shape[0])


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    """PyTorch's own gradients of (x, weight, bias), those that are wanted."""
    pad, channels = weight.shape[2] // 2, weight.shape[0]
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, (stride, stride), (pad, pad), (1, 1), False, (0, 0), channels, wanted
    )
    return cast(tuple[Tensor, ...], gradients)


def _in_triton(x: Tensor) -> bool:
    return x.device.type == "cuda" and compiles("cuda")


# ------------------------------------------------------------------------------------ what compilers and autograd see

forward_operator = torch.library.custom_op("nvae::depthwise", _forward, mutates_args=())
input_gradient_operator = torch.library.custom_op("nvae::depthwise_input_gradient", _input_gradient, mutates_args=())
weight_gradient_operator = torch.library.custom_op("nvae::depthwise_weight_gradient", _weight_gradient, mutates_args=())


@forward_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    batch, channels, height, width = x.shape
    return _empty(x, (batch, channels, -(-height // stride), -(-width // stride)))


@input_gradient_operator.register_fake
def _(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    return _empty(grad, (*grad.shape[:2], height, width))


@weight_gradient_operator.register_fake
def _(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    return x.new_empty((x.shape[1], 1, size, size), dtype=at_least_float32(x.new_empty(0)).dtype)


def _empty(x: Tensor, shape: tuple[Any, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    x, weight, _, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    x_grad = input_gradient(grad, weight, (x.shape[2], x.shape[3]), ctx.stride) if needs_x else None
    weight_grad = weight_gradient(grad, x, weight.shape[2], ctx.stride).to(weight.dtype) if needs_weight else None
    return x_grad, weight_grad, grad.sum((0, 2, 3)) if needs_bias else None, None


forward_operator.register_autograd(_gradients, setup_context=_keep)
