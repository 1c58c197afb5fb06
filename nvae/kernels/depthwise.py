"""Depthwise convolution as an operator of its own, with its gradients: fast where PyTorch's is not.

Plainly, all three are PyTorch's. On the CPU the input gradient at stride 1 is a forward pass with the kernel turned
round, and the weight gradient K·K shifted products summed in one pass (docs/performance.md). On CUDA all three are
Triton kernels (nvae/kernels/triton/depthwise.py). Memory is channels-last.

The operators are opaque to `torch.compile`: never traced into, never a graph break. Where nobody traces, watches or
differentiates, their functions are called without them.

Shapes: B batch, C channels, H W space of x, h w space of y = ceil(H/stride), K kernel side (odd), padding K // 2.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.precision import at_least_float32
from .compilers import compiles
from .fusion import fused
from .native import channels_last
from .operations import operation
from .watching import watched

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


# ----------------------------------------------------------------------------------------------------------- plainly


def _sizes(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """x, y's gradient, K and stride: an odd number of channels, more taps than pixels, a resolution that halves."""
    generator = torch.Generator().manual_seed(0)
    for channels, side, size, stride in ((6, 5, 3, 1), (40, 6, 5, 1), (40, 6, 5, 2)):
        x = torch.randn(2, channels, side, side, generator=generator)
        grad = torch.randn(2, channels, -(-side // stride), -(-side // stride), generator=generator)
        yield x.to(device, dtype), grad.to(device, dtype), size, stride


def _kernel(x: Tensor, size: int) -> Tensor:
    taps = torch.randn(x.shape[1], 1, size, size, generator=torch.Generator().manual_seed(1))
    return taps.to(x)


def _inputs(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, _, size, stride in _sizes(device, dtype):
        yield x, _kernel(x, size), x[0, :, 0, 0].clone(), stride


def _output_gradients(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, grad, size, stride in _sizes(device, dtype):
        yield grad, _kernel(x, size), *x.shape[2:], stride


def _both(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    return ((grad, x, size, stride) for x, grad, size, stride in _sizes(device, dtype))


@operation(_inputs, differentiable=False)
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """(B, C, H, W), weight (C, 1, K, K) -> (B, C, h, w)."""
    return F.conv2d(x, weight, bias, stride, weight.shape[2] // 2, 1, weight.shape[0])


@operation(_output_gradients, differentiable=False)
def depthwise_input_gradient(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """(B, C, H, W). In float32 also for smaller types: PyTorch's own takes 80 times as long in bfloat16 on a CPU."""
    wide, kernel = at_least_float32(channels_last(grad)), at_least_float32(weight)
    x = wide.new_empty(1).expand(*grad.shape[:2], height, width)
    return _torch_gradients(wide, x, kernel, stride, (True, False, False))[0].to(grad.dtype)


@operation(_both, differentiable=False)
def depthwise_weight_gradient(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    """(C, 1, K, K), float32 or more."""
    weight = x.new_empty(1).expand(x.shape[1], 1, size, size)
    return at_least_float32(_torch_gradients(grad, x, weight, stride, (False, True, False))[1])


def _torch_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    """PyTorch's own gradients of (x, weight, bias), those that are wanted."""
    pad, channels = weight.shape[2] // 2, weight.shape[0]
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, (stride, stride), (pad, pad), (1, 1), False, (0, 0), channels, wanted
    )
    return cast(tuple[Tensor, ...], gradients)


# ------------------------------------------------------------------------------------------------------------ faster


def turned_forward(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The input gradient at stride 1: a forward pass with the kernel turned round."""
    if stride != 1:
        return NotImplemented  # type: ignore[no-any-return]
    return depthwise.plain(channels_last(grad), weight.flip(2, 3), None, 1)


def summed_taps(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    """The weight gradient as K·K shifted products, a few rows of the kernel in one pass."""
    if not compiles(x.device.type):
        return NotImplemented  # type: ignore[no-any-return]
    rows = max(TAPS_PER_PASS // size, 1)  # of the kernel, in one pass
    passes = [range(first, min(first + rows, size)) for first in range(0, size, rows)]
    rows_x, rows_grad = channels_last(x).permute(0, 2, 3, 1), channels_last(grad).permute(0, 2, 3, 1)
    taps = torch.cat([_summed_taps(rows_x, rows_grad, size, stride, part.start, part.stop) for part in passes])
    return taps.t().reshape(-1, 1, size, size).contiguous()


def _few_rows(x: Tensor, grad: Tensor, size: int, stride: int, *rows: int) -> tuple[Any, ...]:
    """Small arguments of `_summed_taps`: two images of 4 × 4 results."""
    few = x[:2, : 4 * stride, : 4 * stride], grad[:2, :4, :4]
    return *(tensor.clone() for tensor in few), size, stride, *rows


@fused(dynamic=False, small=_few_rows)
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


# ------------------------------------------------------------------------------------ what compilers and autograd see


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    return channels_last(depthwise(channels_last(x), weight, bias, stride))


def _input_gradient(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    return channels_last(depthwise_input_gradient(grad, weight, height, width, stride))


def _weight_gradient(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    return depthwise_weight_gradient(channels_last(grad), channels_last(x), size, stride).contiguous()


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
