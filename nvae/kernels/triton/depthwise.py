"""Depthwise convolution in Triton: forward, input gradient, weight gradient, on channels-last memory.

Sums are in float32 (float64 for float64 inputs), whatever the type of the tensors; no atomics, so results repeat.
Channels are known when a kernel is made: rows of 180 neighbours, too, are then read several at once.

Shapes: B batch, H W space of x, h w space of y = ceil(H/stride), C channels, K kernel side (odd), padding K // 2.
Tensors come as (B, C, H, W) in channels-last memory, that is B·H·W rows of C neighbours; kernels as (K·K, C).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_CHANNELS = 64
BLOCK_COLUMNS = 16
POSITIONS_PER_PROGRAM = 64
"""How many output positions one program of the weight gradient sums over, at most."""


@triton.jit
def _forward(
    x_pointer,
    taps_pointer,
    bias_pointer,
    y_pointer,
    height,
    width,
    out_height,
    out_width,
    channels: tl.constexpr,
    has_bias: tl.constexpr,
    stride: tl.constexpr,
    size: tl.constexpr,
    accumulator: tl.constexpr,
    block_columns: tl.constexpr,
    block_channels: tl.constexpr,
):
    """One row of y, `block_columns` wide and `block_channels` deep."""
    image = (tl.program_id(0) // out_height).to(tl.int64)
    row = tl.program_id(0) % out_height
    columns = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    channel = tl.program_id(2) * block_channels + tl.arange(0, block_channels)
    inside = channel < channels
    total = tl.zeros((block_columns, block_channels), accumulator)
    if has_bias:
        total += tl.load(bias_pointer + channel, mask=inside, other=0.0).to(accumulator)[None, :]
    for i in tl.static_range(size):
        source_row = row * stride + i - size // 2
        if (source_row >= 0) & (source_row < height):
            for j in tl.static_range(size):
                source = columns * stride + j - size // 2
                valid = (source >= 0) & (source < width)
                place = ((image * height + source_row) * width + source)[:, None] * channels + channel[None, :]
                x = tl.load(x_pointer + place, mask=valid[:, None] & inside[None, :], other=0.0)
                tap = tl.load(taps_pointer + (i * size + j) * channels + channel, mask=inside, other=0.0)
                total += x.to(accumulator) * tap.to(accumulator)[None, :]
    place = ((image * out_height + row) * out_width + columns)[:, None] * channels + channel[None, :]
    tl.store(y_pointer + place, total, mask=(columns < out_width)[:, None] & inside[None, :])


@triton.jit
def _input_gradient(
    grad_pointer,
    taps_pointer,
    x_grad_pointer,
    height,
    width,
    out_height,
    out_width,
    channels: tl.constexpr,
    stride: tl.constexpr,
    size: tl.constexpr,
    accumulator: tl.constexpr,
    block_columns: tl.constexpr,
    block_channels: tl.constexpr,
):
    """One row of x's gradient: each element gathers from the outputs it took part in."""
    image = (tl.program_id(0) // height).to(tl.int64)
    row = tl.program_id(0) % height
    columns = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    channel = tl.program_id(2) * block_channels + tl.arange(0, block_channels)
    inside = channel < channels
    total = tl.zeros((block_columns, block_channels), accumulator)
    for i in tl.static_range(size):
        above = row + size // 2 - i
        source_row = above // stride
        if (above >= 0) & (above % stride == 0) & (source_row < out_height):
            for j in tl.static_range(size):
                before = columns + size // 2 - j
                source = before // stride
                valid = (before >= 0) & (before % stride == 0) & (source < out_width)
                place = ((image * out_height + source_row) * out_width + source)[:, None] * channels + channel[None, :]
                grad = tl.load(grad_pointer + place, mask=valid[:, None] & inside[None, :], other=0.0)
                tap = tl.load(taps_pointer + (i * size + j) * channels + channel, mask=inside, other=0.0)
                total += grad.to(accumulator) * tap.to(accumulator)[None, :]
    place = ((image * height + row) * width + columns)[:, None] * channels + channel[None, :]
    tl.store(x_grad_pointer + place, total, mask=(columns < width)[:, None] & inside[None, :])


@triton.jit
def _weight_gradient(
    x_pointer,
    grad_pointer,
    partial_pointer,
    height,
    width,
    out_height,
    out_width,
    positions,
    channels: tl.constexpr,
    stride: tl.constexpr,
    size: tl.constexpr,
    accumulator: tl.constexpr,
    positions_per_program: tl.constexpr,
    block_taps: tl.constexpr,
    block_channels: tl.constexpr,
):
    """All taps of `block_channels` channels, summed over a run of output positions, into one row of partial sums."""
    tap = tl.arange(0, block_taps)
    i, j = tap // size, tap % size
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    inside = channel < channels
    total = tl.zeros((block_taps, block_channels), accumulator)
    first = tl.program_id(0) * positions_per_program
    for position in range(first, tl.minimum(first + positions_per_program, positions)):
        column = position % out_width
        row = position // out_width % out_height
        image = (position // (out_width * out_height)).to(tl.int64)
        source_row, source = row * stride + i - size // 2, column * stride + j - size // 2
        valid = (source_row >= 0) & (source_row < height) & (source >= 0) & (source < width) & (tap < size * size)
        place = ((image * height + source_row) * width + source)[:, None] * channels + channel[None, :]
        x = tl.load(x_pointer + place, mask=valid[:, None] & inside[None, :], other=0.0)
        grad_place = ((image * out_height + row) * out_width + column) * channels + channel
        grad = tl.load(grad_pointer + grad_place, mask=inside, other=0.0)
        total += x.to(accumulator) * grad.to(accumulator)[None, :]
    place = (tl.program_id(0).to(tl.int64) * size * size + tap)[:, None] * channels + channel[None, :]
    tl.store(partial_pointer + place, total, mask=(tap < size * size)[:, None] & inside[None, :])


def _on_its_device(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Launches on the device of the first argument, which need not be the current one."""

    @wraps(function)
    def call(x: Tensor, *others: Any) -> Tensor:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return function(x, *others)

    return call


@_on_its_device
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """x (B, C, H, W), weight (C, 1, K, K), bias (C) -> (B, C, h, w)."""
    batch, channels, height, width = x.shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    y = _like(x, (batch, channels, out_height, out_width))
    grid = (batch * out_height, triton.cdiv(out_width, BLOCK_COLUMNS), triton.cdiv(channels, BLOCK_CHANNELS))
    _forward[grid](
        _rows(x),
        _taps(weight),
        weight if bias is None else bias,  # not read without a bias
        y,
        height,
        width,
        out_height,
        out_width,
        channels=channels,
        has_bias=bias is not None,
        **_sizes(x, weight, stride),
    )
    return y


@_on_its_device
def input_gradient(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The gradient (B, C, H, W) of x, from that of y (B, C, h, w)."""
    batch, channels, out_height, out_width = grad.shape
    x_grad = _like(grad, (batch, channels, height, width))
    grid = (batch * height, triton.cdiv(width, BLOCK_COLUMNS), triton.cdiv(channels, BLOCK_CHANNELS))
    _input_gradient[grid](
        _rows(grad),
        _taps(weight),
        x_grad,
        height,
        width,
        out_height,
        out_width,
        channels=channels,
        **_sizes(grad, weight, stride),
    )
    return x_grad


@_on_its_device
def weight_gradient(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    """The gradient (C, 1, K, K), float32 or more, of the kernel."""
    batch, channels, height, width = x.shape
    out_height, out_width = grad.shape[2:]
    positions = batch * out_height * out_width
    programs = triton.cdiv(positions, POSITIONS_PER_PROGRAM)
    partial = x.new_empty((programs, size * size, channels), dtype=_sum_type(x))
    _weight_gradient[(programs, triton.cdiv(channels, BLOCK_CHANNELS))](
        _rows(x),
        _rows(grad),
        partial,
        height,
        width,
        out_height,
        out_width,
        positions,
        channels=channels,
        stride=stride,
        size=size,
        accumulator=_triton_type(x),
        positions_per_program=POSITIONS_PER_PROGRAM,
        block_taps=triton.next_power_of_2(size * size),
        block_channels=BLOCK_CHANNELS,
    )
    return partial.sum(0).t().reshape(channels, 1, size, size)


def _sizes(x: Tensor, weight: Tensor, stride: int) -> dict[str, object]:
    return {
        "stride": stride,
        "size": weight.shape[2],
        "accumulator": _triton_type(x),
        "block_columns": BLOCK_COLUMNS,
        "block_channels": BLOCK_CHANNELS,
    }


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, K, K) -> (K·K, C), contiguous."""
    return weight.flatten(1).t().contiguous()


def _like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _triton_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
