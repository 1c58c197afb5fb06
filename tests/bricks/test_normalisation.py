"""Batch norm with its activation, and with the convolution after it, against PyTorch's."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.bricks.convolutions import Conv2d
from nvae.bricks.normalisation import BatchNorm, measuring
from nvae.kernels.activations import ACTIVATIONS, Activation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
NAIVE = {
    "identity": lambda u: u,
    "swish": lambda u: u * torch.sigmoid(u),
    "elu": F.elu,
    "elu_elu": lambda u: F.elu(F.elu(u)),
    "gelu": lambda u: u * torch.special.ndtr(u),
}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1x1": {},
    "3x3 with stride": {"kernel_size": 3, "stride": 2},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "depthwise": {"kernel_size": 5, "groups": 6, "bias": False},
    "depthwise with stride and bias": {"kernel_size": 3, "groups": 6, "stride": 2},
    "enlarging": {"kernel_size": 3, "enlarge": True},
    "depthwise and enlarging": {"kernel_size": 5, "groups": 6, "enlarge": True},
    "in groups": {"kernel_size": 3, "groups": 2},
}
EVERY_CONVOLUTION = pytest.mark.parametrize("kind", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
FUSED_IMAGES = 64
"""Enough for compiled kernels, which small tensors do without."""


def pair(activation: Activation = "identity", channels: int = 6) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours and PyTorch's with the same random scale and shift."""
    ours, theirs = BatchNorm(channels, activation), nn.BatchNorm2d(channels, eps=1e-5, momentum=0.05)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(batch: int = 4, side: int = 4) -> Tensor:
    """(batch, 6, side, side + 2): every channel with a mean and a deviation of its own."""
    scale, shift = torch.linspace(0.1, 3, 6)[:, None, None], torch.arange(6.0)[:, None, None]
    return torch.randn(batch, 6, side, side + 2) * scale + shift


def close(ours: Tensor, theirs: Tensor, error: float) -> None:
    """To an error relative to the largest value."""
    assert ours.shape == theirs.shape
    assert float((ours.double() - theirs.double()).abs().max()) <= error * float(theirs.abs().max())


def twin_of(norm: BatchNorm, convolution: Conv2d) -> Any:
    """convolution(norm(x)) in float64, of PyTorch's parts; and its parameters, in the order γ, β, kernel, bias."""
    kernel = convolution.effective_weight().detach().double().requires_grad_()
    bias = None if convolution.bias is None else convolution.bias.detach().double().requires_grad_()
    gamma, beta = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    geometry = convolution.geometry

    def forward(x: Tensor) -> Tensor:
        y = NAIVE[norm.activation](F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5))
        if geometry.enlarge:
            y = y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return F.conv2d(y, kernel, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)

    return forward, [p for p in (gamma, beta, kernel, bias) if p is not None]


# ------------------------------------------------------------------------------------------------------------- alone


@EVERY_ACTIVATION
def test_training_is_that_of_torch(activation: Activation) -> None:
    ours, theirs = pair(activation)
    for _ in range(3):
        x = images()
        torch.testing.assert_close(ours(x), NAIVE[activation](theirs(x)), rtol=1e-5, atol=1e-5)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


@EVERY_ACTIVATION
def test_gradients_are_those_of_torch(activation: Activation) -> None:
    ours, theirs = pair(activation)
    x = images()
    weights, gradients = torch.randn_like(x), []
    for forward, norm in ((ours, ours), (lambda u: NAIVE[activation](theirs(u)), theirs)):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad((forward(leaf) * weights).sum(), [leaf, norm.weight, norm.bias]))
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@EVERY_ACTIVATION
def test_gradients_agree_with_finite_differences(activation: Activation) -> None:
    norm = pair(activation)[0].double()
    x = images(2).double().requires_grad_()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))  # type: ignore[no-any-return]

    weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    assert torch.autograd.gradcheck(forward, (x, weight, bias))


@EVERY_ACTIVATION
def test_evaluation_is_that_of_torch_and_advances_nothing(activation: Activation) -> None:
    ours, theirs = pair(activation)
    ours(images()), theirs(images())
    theirs.load_state_dict(ours.state_dict())
    state = copy.deepcopy(ours.state_dict())
    x = images()
    torch.testing.assert_close(ours.eval()(x), NAIVE[activation](theirs.eval()(x)))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name])


@EVERY_DEVICE
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_fused_kernels_have_the_values_and_gradients_of_float64(device: str, dtype: torch.dtype, error: float) -> None:
    ours, theirs = pair("swish")
    ours, theirs = ours.to(device), theirs.double().to(device)
    x = images(FUSED_IMAGES, 14).to(device, dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = ours(x), F.silu(theirs(wide))
    grad = torch.randn_like(y)
    close(y, expected, error)
    mine = torch.autograd.grad(y, [x, ours.weight, ours.bias], grad)
    for gradient, other in zip(
        mine, torch.autograd.grad(expected, [wide, theirs.weight, theirs.bias], grad.double()), strict=True
    ):
        close(gradient, other, error)
    close(ours.running_var, theirs.running_var, 1e-5)
    close(ours.running_mean, theirs.running_mean, 1e-5)


def test_running_statistics_move_by_a_twentieth() -> None:
    norm, x = BatchNorm(6), images()
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.05 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.95 + 0.05 * x.transpose(0, 1).flatten(1).var(1))
    assert norm.num_batches_tracked == 1


def test_running_statistics_forget_a_twentieth_a_batch_in_float64() -> None:
    """The closed form, batches of any size counting alike: 0.95ⁿ of the start, 0.05 · 0.95ⁿ⁻ⁱ of batch i."""
    norm, batches = BatchNorm(6).double(), [images(size).double() for size in (1, 2, 5, 3, 4, 2, 7)]
    for x in batches:
        norm(x)
    moments = torch.stack([torch.stack([x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1)]) for x in batches])
    n = len(batches)
    weights = 0.05 * 0.95 ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
    mean, var = (weights[:, None, None] * moments).sum(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 0.95**n + var, rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked == n


def test_copies_of_a_pixel_count_in_the_running_variance() -> None:
    """Only there: mean and biased variance of an enlarged image are those of the image."""
    once, enlarged, x = BatchNorm(6, copies=4), BatchNorm(6), images()
    y = once(x)
    large = enlarged(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    torch.testing.assert_close(y, large[:, :, ::2, ::2], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(once.buffers(), enlarged.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_statistics_of_bfloat16_are_float32_and_the_result_is_not() -> None:
    norm, x = BatchNorm(6), images(64).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, 0.05 * x.float().mean((0, 2, 3)))


def test_a_large_mean_costs_no_precision() -> None:
    """Means a thousand times the deviations, and a first image far from the others."""
    x = torch.randn(16, 6, 8, 8).double() + 1e3
    x[0] += 20
    norm = BatchNorm(6)
    y = norm(x.float())
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    expected = (x - mean[:, None, None]) / variance[:, None, None].sqrt()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-3)
    close(norm.running_var, 0.95 + 0.05 * x.transpose(0, 1).flatten(1).var(1), 1e-5)


def test_one_value_per_channel_becomes_the_shift() -> None:
    norm = BatchNorm(6)
    assert norm(torch.randn(1, 6, 1, 1)).abs().max() < 1e-4
    assert norm.running_var.isfinite().all()


def test_second_derivatives_are_refused_not_wrong() -> None:
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(BatchNorm(6)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_measuring_takes_the_statistics_of_the_last_pass() -> None:
    norm = BatchNorm(6)
    with measuring([norm]):
        norm(images())
        x = images()
        norm(x)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.transpose(0, 1).flatten(1).var(1))


def test_copies_of_a_trained_norm_work() -> None:
    norm = BatchNorm(6)
    norm(images().requires_grad_())
    x = images()
    assert torch.equal(copy.deepcopy(norm)(x), norm(x))


# ---------------------------------------------------------------------------------------------- into a convolution


@pytest.mark.parametrize("activation", ["identity", "swish", "elu"])
@EVERY_CONVOLUTION
def test_into_a_convolution_is_one_after_the_other(kind: dict[str, Any], activation: Activation) -> None:
    norm, convolution = pair(activation)[0], Conv2d(6, 6, **kind)
    forward, parameters = twin_of(norm, convolution)
    x = images().requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = norm.into(convolution, x), forward(wide)
    close(y, expected, 1e-5)
    grad = torch.randn_like(y)
    theirs = torch.autograd.grad(expected, [wide, *parameters[:2]], grad.double())
    for mine, other in zip(torch.autograd.grad(y, [x, norm.weight, norm.bias], grad), theirs, strict=True):
        close(mine, other, 1e-4)


@EVERY_CONVOLUTION
def test_the_kernel_gets_the_gradient_of_one_after_the_other(kind: dict[str, Any]) -> None:
    norm, convolution = pair("swish")[0], Conv2d(6, 6, **kind, normalised=False)
    forward, parameters = twin_of(norm, convolution)
    x = images()
    y, expected = norm.into(convolution, x), forward(x.double())
    grad = torch.randn_like(y)
    own = [convolution.weight] if convolution.bias is None else [convolution.weight, convolution.bias]
    theirs = torch.autograd.grad(expected, parameters[2:], grad.double())
    for mine, other in zip(torch.autograd.grad(y, own, grad), theirs, strict=True):
        close(mine, other, 1e-5)


@EVERY_CONVOLUTION
def test_into_a_convolution_agrees_with_finite_differences(kind: dict[str, Any]) -> None:
    norm, convolution = pair("elu")[0].double(), Conv2d(6, 6, **kind).double()
    x = torch.randn(2, 6, 2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm.into(convolution, x), x)


@EVERY_CONVOLUTION
def test_in_evaluation_too(kind: dict[str, Any]) -> None:
    norm, convolution = pair("swish")[0].eval(), Conv2d(6, 6, **kind)
    x = images()
    torch.testing.assert_close(norm.into(convolution, x), convolution(norm(x)))


@EVERY_DEVICE
def test_fused_into_a_convolution_is_float64_one_after_the_other(device: str) -> None:
    norm, convolution = pair("swish")[0].to(device), Conv2d(6, 6, 5, groups=6).to(device)
    forward, parameters = twin_of(norm, convolution)
    x = images(FUSED_IMAGES, 14).to(device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = norm.into(convolution, x), forward(wide)
    close(y, expected, 1e-4)
    grad = torch.randn_like(y)
    theirs = torch.autograd.grad(expected, [wide, *parameters[:2]], grad.double())
    for mine, other in zip(torch.autograd.grad(y, [x, norm.weight, norm.bias], grad), theirs, strict=True):
        close(mine, other, 1e-4)


def test_under_autocast_the_convolution_is_bfloat16_and_the_statistics_are_not() -> None:
    norm, convolution, x = pair("swish")[0], Conv2d(6, 6, 3), images()
    expected = copy.deepcopy(norm).into(convolution, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm.into(convolution, x)
    assert y.dtype == torch.bfloat16
    close(y, expected, 2e-2)
    torch.testing.assert_close(norm.running_mean, 0.05 * x.mean((0, 2, 3)))


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    norm, convolution = BatchNorm(6, "swish"), Conv2d(6, 6, 3)
    x = images(8, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    large: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel():
            large.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm.into(convolution, x)
    assert large == {x.data_ptr()}
