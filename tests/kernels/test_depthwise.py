"""The depthwise operator and its gradients against PyTorch's convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.kernels import depthwise
from nvae.kernels.depthwise import depthwise_conv2d

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)
EVERY_STRIDE = pytest.mark.parametrize("stride", [1, 2])
# (batch, channels, height, width), kernel: odd sides, more taps than pixels, one large enough for the fused kernels.
SHAPES = [((2, 3, 7, 6), 3), ((2, 4, 6, 9), 5), ((3, 2, 5, 5), 11), ((1, 70, 4, 17), 5), ((4, 32, 24, 24), 5)]
EVERY_SHAPE = pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)


def reference(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight, None, stride, weight.shape[2] // 2, 1, weight.shape[0])


def close(ours: Tensor, theirs: Tensor, error: float) -> None:
    """To an error relative to the largest value."""
    assert ours.shape == theirs.shape
    assert float((ours.double() - theirs.double()).abs().max()) <= error * float(theirs.abs().max())


@EVERY_DEVICE
@EVERY_STRIDE
@EVERY_SHAPE
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_values_and_gradients_are_those_of_float64(
    shape: tuple[int, ...], size: int, stride: int, dtype: torch.dtype, error: float, device: str
) -> None:
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    weight = torch.randn(shape[1], 1, size, size, device=device).to(dtype).requires_grad_()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    ours, theirs = depthwise_conv2d(x, weight, stride), reference(*wide, stride)
    grad = torch.randn_like(ours)
    close(ours, theirs, error)
    expected = torch.autograd.grad(theirs, wide, grad.double())
    for mine, other, leaf in zip(torch.autograd.grad(ours, [x, weight], grad), expected, (x, weight), strict=True):
        assert mine.dtype == leaf.dtype
        close(mine, other, error)


@EVERY_STRIDE
def test_gradients_agree_with_finite_differences(stride: int) -> None:
    shapes = ((2, 3, 5, 4), (3, 1, 3, 3), (3,))
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda x, weight, bias: depthwise_conv2d(x, weight, stride, bias), inputs)


@EVERY_DEVICE
@EVERY_STRIDE
def test_a_bias_is_added(stride: int, device: str) -> None:
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((2, 70, 6, 7), (70, 1, 5, 5), (70,)))
    expected = depthwise_conv2d(x, weight, stride) + bias[:, None, None]
    torch.testing.assert_close(depthwise_conv2d(x, weight, stride, bias), expected)


@EVERY_DEVICE
@EVERY_STRIDE
def test_the_layout_of_memory_does_not_matter(stride: int, device: str) -> None:
    x, weight = torch.randn(2, 8, 6, 7, device=device), torch.randn(8, 1, 5, 5, device=device)
    expected = depthwise_conv2d(x, weight, stride)
    torch.testing.assert_close(
        depthwise_conv2d(x.contiguous(memory_format=torch.channels_last), weight, stride), expected
    )
    torch.testing.assert_close(
        depthwise_conv2d(x.transpose(2, 3).contiguous().transpose(2, 3), weight, stride), expected
    )
    assert expected.is_contiguous(memory_format=torch.channels_last)


@EVERY_DEVICE
def test_autocast_decides_the_type_and_the_weight_keeps_its_own(device: str) -> None:
    x = torch.randn(2, 8, 6, 6, device=device)
    weight = torch.randn(8, 1, 5, 5, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = depthwise_conv2d(x, weight)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_the_gradient_of_the_weight_is_summed_in_float32() -> None:
    """10 000 products of ones: bfloat16 would stop at 256."""
    ones = torch.ones(1, 2, 100, 100, dtype=torch.bfloat16)
    centre = depthwise.weight_gradient(ones, ones, 3, 1)[:, 0, 1, 1]
    assert centre.tolist() == [10_000, 10_000]


def test_gradients_repeat_to_the_last_bit() -> None:
    x, grad = torch.randn(4, 32, 24, 24), torch.randn(4, 32, 24, 24)
    assert torch.equal(depthwise.weight_gradient(grad, x, 5, 1), depthwise.weight_gradient(grad, x, 5, 1))


@EVERY_STRIDE
def test_the_operators_keep_what_compilers_are_told_of_them(stride: int) -> None:
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 7, 6), (3, 1, 5, 5), (3,)))
    y = depthwise.forward_operator(x, weight, bias, stride)
    plain = (x.detach(), weight.detach(), y.detach())
    torch.library.opcheck(depthwise.forward_operator, (x, weight, None, stride))
    torch.library.opcheck(depthwise.forward_operator, (x, weight, bias, stride))
    torch.library.opcheck(depthwise.input_gradient_operator, (plain[2], plain[1], 7, 6, stride))
    torch.library.opcheck(depthwise.weight_gradient_operator, (plain[2], plain[0], 5, stride))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    x, weight = torch.randn(2, 4, 7, 7).bfloat16(), torch.randn(4, 1, 5, 5).bfloat16()
    x[1, 2, 3, 3] = value
    with torch.no_grad():
        found = depthwise_conv2d(x, weight)
    assert bool(found[0].isfinite().all()) and not bool(found[1].isfinite().all())
    assert not bool(depthwise.weight_gradient(x, x, 5, 1).isfinite().all())


def test_an_empty_batch_has_an_empty_result_and_a_gradient_of_zeros() -> None:
    x, weight = torch.zeros(0, 4, 7, 7).bfloat16(), torch.zeros(4, 1, 5, 5).bfloat16()
    with torch.no_grad():
        assert depthwise_conv2d(x, weight).shape == x.shape
    assert not bool(depthwise.weight_gradient(x, x, 5, 1).any())
