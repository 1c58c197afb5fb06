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
COLUMNS = 4
"""Neighbours in a row that a thread computes: what it reads of x serves up to all of them."""
MOST_RUNS = 16
"""Of four columns, in a program."""
POSITIONS_PER_PROGRAM = 64
"""How many output positions one program of the weight gradient sums over, as a rule."""


@triton.jit
def _pixels(x_line, first, offset: tl.constexpr, width, channel, channels: tl.constexpr, accumulator: tl.constexpr):
    """Channels of the pixels of a line at columns `first` + `offset`; 0 outside of it."""
    column = first + offset
    inside = ((column >= 0) & (column < width))[:, None] & (channel < channels)[None, :]
    return tl.load(x_line + column[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(accumulator)


@triton.jit
def _store(y_line, column, width, channel, channels: tl.constexpr, total):
    inside = (column < width)[:, None] & (channel < channels)[None, :]
    tl.store(y_line + column[:, None] * channels + channel[None, :], total, mask=inside)


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
    turned: tl.constexpr,
    stride: tl.constexpr,
    size: tl.constexpr,
    accumulator: tl.constexpr,
    block_runs: tl.constexpr,
    block_channels: tl.constexpr,
):
    """A row of y: `block_runs` runs of four columns, `block_channels` deep; by the kernel, or by it turned round."""
    image = (tl.program_id(0) // out_height).to(tl.int64)
    row = tl.program_id(0) % out_height
    column = (tl.program_id(1) * block_runs + tl.arange(0, block_runs)) * 4
    channel = tl.program_id(2) * block_channels + tl.arange(0, block_channels)
    total_0 = tl.zeros((block_runs, block_channels), accumulator)
    if has_bias:
        total_0 += tl.load(bias_pointer + channel, mask=channel < channels, other=0.0).to(accumulator)[None, :]
    total_1, total_2, total_3 = total_0, total_0, total_0
    first = column * stride - size // 2
    for i in tl.static_range(size):
        source_row = row * stride + i - size // 2
        if (source_row >= 0) & (source_row < height):
            x_line = x_pointer + (image * height + source_row) * width * channels
            for j in tl.static_range(size):
                taps = taps_pointer + (size * size - 1 - i * size - j if turned else i * size + j) * channels
                tap = tl.load(taps + channel, mask=channel < channels, other=0.0)[None, :]
                total_0 += _pixels(x_line, first, j, width, channel, channels, accumulator) * tap
                total_1 += _pixels(x_line, first, j + stride, width, channel, channels, accumulator) * tap
                total_2 += _pixels(x_line, first, j + 2 * stride, width, channel, channels, accumulator) * tap
                total_3 += _pixels(x_line, first, j + 3 * stride, width, channel, channels, accumulator) * tap
    y_line = y_pointer + (image * out_height + row) * out_width * channels
    _store(y_line, column, out_width, channel, channels, total_0)
    _store(y_line, column + 1, out_width, channel, channels, total_1)
    _store(y_line, column + 2, out_width, channel, channels, total_2)
    _store(y_line, column + 3, out_width, channel, channels, total_3)


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
    rows,
    channels: tl.constexpr,
    stride: tl.constexpr,
    size: tl.constexpr,
    accumulator: tl.constexpr,
    rows_per_program: tl.constexpr,
    block_taps: tl.constexpr,
    block_channels: tl.constexpr,
):
    """All taps of `block_channels` channels, summed over a run of rows of y, into one row of partial sums."""
    tap = tl.arange(0, block_taps)
    i, j = tap // size - size // 2, tap % size - size // 2
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    inside = channel < channels
    total = tl.zeros((block_taps, block_channels), accumulator)
    first = tl.program_id(0) * rows_per_program
    for line in range(first, tl.minimum(first + rows_per_program, rows)):
        image, row = (line // out_height).to(tl.int64), line % out_height
        source_row = row * stride + i
        has_row = (source_row >= 0) & (source_row < height) & (tap < size * size)
        place = ((image * height + source_row) * width + j)[:, None] * channels + channel[None, :]
        grad_place = (image * out_height + row) * out_width * channels + channel
        for column in tl.range(0, out_width, loop_unroll_factor=4):
            source = column * stride + j
            valid = has_row & (source >= 0) & (source < width)
            x = tl.load(x_pointer + place, mask=valid[:, None] & inside[None, :], other=0.0)
            grad = tl.load(grad_pointer + grad_place, mask=inside, other=0.0)
            total += x.to(accumulator) * grad.to(accumulator)[None, :]
            place += stride * channels
            grad_place += channels
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
    return _run_forward(x, weight, bias, stride, turned=False)


@_on_its_device
def input_gradient(grad: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The gradient (B, C, H, W) of x, from that of y (B, C, h, w); at stride 1 a convolution by the kernel turned."""
    if stride == 1:
        return _run_forward(grad, weight, None, 1, turned=True)
    batch, channels, out_height, out_width = grad.shape
    x_grad = _like(grad, (batch, channels, height, width))
    grid = (batch * height, triton.cdiv(width, BLOCK_COLUMNS), triton.cdiv(channels, BLOCK_CHANNELS))
    _input_gradient[grid](
        _rows(grad),
        _taps(weight, grad),
        x_grad,
        height,
        width,
        out_height,
        out_width,
        channels=channels,
        stride=stride,
        size=weight.shape[2],
        accumulator=_triton_type(grad),
        block_columns=BLOCK_COLUMNS,
        block_channels=BLOCK_CHANNELS,
    )
    return x_grad


def _run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, *, turned: bool) -> Tensor:
    batch, channels, height, width = x.shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    y = _like(x, (batch, channels, out_height, out_width))
    runs = triton.next_power_of_2(min(triton.cdiv(out_width, COLUMNS), MOST_RUNS))
    grid = (batch * out_height, triton.cdiv(out_width, COLUMNS * runs), triton.cdiv(channels, BLOCK_CHANNELS))
    _forward[grid](
        _rows(x),
        _taps(weight, x),
        weight if bias is None else bias,  # not read without a bias
        y,
        height,
        width,
        out_height,
        out_width,
        channels=channels,
        has_bias=bias is not None,
        turned=turned,
        stride=stride,
        size=weight.shape[2],
        accumulator=_triton_type(x),
        block_runs=runs,
        block_channels=BLOCK_CHANNELS,
        num_warps=warps(runs),
    )
    return y


def warps(runs: int) -> int:
    """Of a program that computes so many runs of columns: a thread has one of them, eight channels deep."""
    return max(runs * BLOCK_CHANNELS // (8 * 32), 1)


@_on_its_device
def weight_gradient(grad: Tensor, x: Tensor, size: int, stride: int) -> Tensor:
    """The gradient (C, 1, K, K), float32 or more, of the kernel."""
    batch, channels, height, width = x.shape
    out_height, out_width = grad.shape[2:]
    rows = batch * out_height
    rows_per_program = triton.cdiv(POSITIONS_PER_PROGRAM, out_width)
    programs = triton.cdiv(rows, rows_per_program)
    partial = x.new_empty((programs, size * size, channels), dtype=_sum_type(x))
    _weight_gradient[(programs, triton.cdiv(channels, BLOCK_CHANNELS))](
        _rows(x),
        _rows(grad),
        partial,
        height,
        width,
        out_height,
        out_width,
        rows,
        channels=channels,
        stride=stride,
        size=size,
        accumulator=_triton_type(x),
        rows_per_program=rows_per_program,
        block_taps=triton.next_power_of_2(size * size),
        block_channels=BLOCK_CHANNELS,
    )
    return partial.sum(0).t().reshape(channels, 1, size, size)


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """(C, 1, K, K) -> (K·K, C), contiguous, in the type of sums over x: cast once, not by every thread."""
    taps = weight.flatten(1).t()
    return torch.empty(taps.shape, dtype=_sum_type(x), device=x.device).copy_(taps)


def _like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _triton_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
