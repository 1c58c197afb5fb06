"""What the operators of nvae/kernels/depthwise.py return lies in memory as they promise compilers: on the CPU, and by
the Triton kernels, which Triton's interpreter runs in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from places import ROOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nvae.kernels import depthwise

SHAPES = [(2, 3, 7, 6), (2, 6, 5, 4), (1, 40, 4, 4), (3, 7, 1, 5), (2, 4, 1, 1)]
"""Odd numbers of channels, and sides of 1, along which strides say nothing."""
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Images as callers have them: channels last, in PyTorch's own order, and a part of larger ones."""
    batch, channels, height, width = shape
    x = torch.randn(batch, channels + 2, height, width).to(dtype)
    yield x[:, :channels].contiguous(memory_format=torch.channels_last)
    yield x[:, :channels].contiguous()
    yield x[:, 1:-1]


def surprises(shape: tuple[int, ...], dtype: torch.dtype, size: int, stride: int) -> list[str]:
    """Where a result differs from what its operator promises of it."""
    batch, channels, height, width = shape
    weight, bias = torch.randn(channels, 1, size, size).to(dtype), torch.randn(channels).to(dtype)
    smaller = (batch, channels, -(-height // stride), -(-width // stride))
    found = []
    for x, grad in zip(layouts(shape, dtype), layouts(smaller, dtype), strict=True):
        for operator, args in (
            (depthwise.forward_operator, (x, weight, bias, stride)),
            (depthwise.forward_operator, (x, weight, None, stride)),
            (depthwise.input_gradient_operator, (grad, weight, height, width, stride)),
            (depthwise.weight_gradient_operator, (grad, x, size, stride)),
        ):
            real = operator(*args)
            with FakeTensorMode() as fakes:
                promised = operator(*(fakes.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
            if _laid_out(real) != _laid_out(promised):
                found.append(f"{operator._name} {shape} {dtype}: {_laid_out(real)}, promised {_laid_out(promised)}")
    return found


def _laid_out(x: Tensor) -> tuple[object, ...]:
    """Shape, type, and the strides of sides that are longer than 1, as compilers compare them."""
    strides = [stride for side, stride in zip(x.shape, x.stride(), strict=True) if side > 1]
    return tuple(x.shape), strides, x.dtype


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_result_lies_in_memory_as_promised(shape: tuple[int, ...], stride: int) -> None:
    assert not [line for dtype in TYPES for line in surprises(shape, dtype, 3, stride)]


@pytest.mark.slow
def test_a_result_of_the_triton_kernels_does_too() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "import test_strides; test_strides.run_by_triton()"]
    paths = f"{ROOT}{os.pathsep}{Path(__file__).parent}{os.pathsep}{ROOT / 'tests' / 'support'}"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def run_by_triton() -> None:
    """Prints the surprises of the Triton kernels; the environment asks for the interpreter."""
    from nvae.kernels.triton import depthwise as triton_kernels

    for operation, kernel in (
        (depthwise.depthwise, triton_kernels.forward),
        (depthwise.depthwise_input_gradient, triton_kernels.input_gradient),
        (depthwise.depthwise_weight_gradient, triton_kernels.weight_gradient),
    ):
        operation._trusted = {("cpu", dtype): (kernel,) for dtype in TYPES}
    print(
        json.dumps(
            [line for shape in SHAPES for stride in (1, 2) for line in surprises(shape, torch.float32, 3, stride)]
        )
    )
