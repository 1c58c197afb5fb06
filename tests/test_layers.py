"""Batch norm against PyTorch's, squeeze-and-excitation and skips against their formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.layers import ACTIVATIONS, Activation, BatchNorm, DownSkip, SqueezeExcite, UpSkip, measuring

EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
EITHER_WAY = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
NAIVE = {
    "identity": lambda u: u,
    "swish": lambda u: u * torch.sigmoid(u),
    "elu": F.elu,
    "elu_elu": lambda u: F.elu(F.elu(u)),
    "gelu": lambda u: u * torch.special.ndtr(u),
}


def pair(activation: Activation = "identity", recompute: bool = False) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours and PyTorch's with the same random scale and shift."""
    ours, theirs = BatchNorm(5, activation), nn.BatchNorm2d(5, eps=1e-5, momentum=0.05)
    ours.recompute = recompute
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 5, 3, 6) * torch.linspace(0.1, 3, 5)[:, None, None] + torch.arange(5.0)[:, None, None]


# -------------------------------------------------------------------------------------------------------- batch norm


@EITHER_WAY
@EVERY_ACTIVATION
def test_training_is_that_of_torch(activation: Activation, recompute: bool) -> None:
    ours, theirs = pair(activation, recompute)
    for _ in range(3):
        x = images()
        torch.testing.assert_close(ours(x), NAIVE[activation](theirs(x)), rtol=1e-5, atol=1e-5)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


@EITHER_WAY
@EVERY_ACTIVATION
def test_gradients_are_those_of_torch(activation: Activation, recompute: bool) -> None:
    ours, theirs = pair(activation, recompute)
    x, weights = images(), torch.randn(4, 5, 3, 6)
    gradients = []
    for forward, norm in ((ours, ours), (lambda u: NAIVE[activation](theirs(u)), theirs)):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad((forward(leaf) * weights).sum(), [leaf, norm.weight, norm.bias]))
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@EITHER_WAY
@EVERY_ACTIVATION
def test_gradients_agree_with_finite_differences(activation: Activation, recompute: bool) -> None:
    norm = pair(activation, recompute)[0].double()
    x = images(2).double().requires_grad_()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))  # type: ignore[no-any-return]

    weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    assert torch.autograd.gradcheck(forward, (x, weight, bias))


@EVERY_ACTIVATION
def test_recomputing_changes_nothing(activation: Activation) -> None:
    kept, x = pair(activation)[0], images()
    recomputed = copy.deepcopy(kept)
    recomputed.recompute = True
    results = []
    for norm in (kept, recomputed):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, norm.weight, norm.bias]), norm.running_var])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


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


def test_running_statistics_move_by_a_twentieth() -> None:
    norm, x = BatchNorm(5), images()
    norm(x)
    torch.testing.assert_close(norm.running_mean, 0.05 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.95 + 0.05 * x.transpose(0, 1).flatten(1).var(1))
    assert norm.num_batches_tracked == 1


def test_statistics_of_bfloat16_are_float32_and_the_result_is_not() -> None:
    norm, x = BatchNorm(5), images(64).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, 0.05 * x.float().mean((0, 2, 3)))


@EITHER_WAY
def test_gradients_of_bfloat16_are_close_to_those_of_float32(recompute: bool) -> None:
    norm = pair("swish", recompute)[0]
    x, weights = images(), torch.randn(4, 5, 3, 6)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad((norm(leaf).float() * weights).sum(), leaf)[0].float())
    assert (gradients[0] - gradients[1]).abs().max() < 0.03 * gradients[1].abs().max()


def test_a_large_mean_costs_no_precision() -> None:
    x = torch.randn(16, 5, 8, 8).double() + 1e3
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / x.transpose(0, 1).flatten(1).var(1, correction=0)[
        :, None, None
    ].sqrt()
    torch.testing.assert_close(BatchNorm(5)(x.float()).double(), expected, rtol=1e-3, atol=1e-3)


def test_one_value_per_channel_becomes_the_shift() -> None:
    norm = BatchNorm(5)
    assert norm(torch.randn(1, 5, 1, 1)).abs().max() < 1e-4
    assert norm.running_var.isfinite().all()


def test_second_derivatives_are_refused_not_wrong() -> None:
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(BatchNorm(5)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_measuring_takes_the_statistics_of_the_last_pass() -> None:
    norm = BatchNorm(5)
    with measuring([norm]):
        norm(images())
        x = images()
        norm(x)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.transpose(0, 1).flatten(1).var(1))


def test_copies_of_a_trained_norm_work() -> None:
    norm = BatchNorm(5)
    norm(images().requires_grad_())
    x = images()
    assert torch.equal(copy.deepcopy(norm)(x), norm(x))


# ------------------------------------------------------------------------------------------ squeeze-and-excitation


def test_squeeze_and_excitation_is_its_formula() -> None:
    layer, x = SqueezeExcite(96), torch.randn(2, 96, 4, 5)
    pooled = x.sum((2, 3)) / 20
    hidden = (pooled @ layer.squeeze.weight.T + layer.squeeze.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ layer.excite.weight.T + layer.excite.bias)))
    torch.testing.assert_close(layer(x), x * gate[:, :, None, None])


@pytest.mark.parametrize(("channels", "hidden"), [(16, 4), (64, 4), (80, 5), (256, 16)])
def test_the_hidden_width_is_a_sixteenth_and_at_least_four(channels: int, hidden: int) -> None:
    assert SqueezeExcite(channels).squeeze.weight.shape == (hidden, channels)


# ------------------------------------------------------------------------------------------------------------ skips


def test_a_skip_down_reads_four_phases_in_order() -> None:
    """Quarters of the outputs at (row, column) phases (0,0), (1,1), (0,1), (1,0); each a strided 1×1 convolution."""
    skip, x = DownSkip(4, 10), torch.randn(2, 4, 6, 8)
    activated = x * torch.sigmoid(x)
    parts = []
    for convolution, (row, column) in zip(skip.convolutions, [(0, 0), (1, 1), (0, 1), (1, 0)], strict=True):
        shifted = activated[:, :, row:, column:]
        parts.append(F.conv2d(shifted, convolution.effective_weight(), convolution.bias, stride=2))
    assert [part.shape[1] for part in parts] == [2, 2, 2, 4], "the last takes the remainder"
    torch.testing.assert_close(skip(x), torch.cat(parts, 1))


def test_a_skip_up_is_bilinear_with_aligned_corners() -> None:
    skip, x = UpSkip(4, 2), torch.randn(1, 4, 3, 5)

    def interpolation(size: int) -> Tensor:
        """(2·size, size): the weights of linear interpolation at j·(size − 1)/(2·size − 1)."""
        position = torch.arange(2 * size) * (size - 1) / (2 * size - 1)
        return (1 - (position[:, None] - torch.arange(size)).abs()).clamp(min=0)

    doubled = torch.einsum("ih,jw,bchw->bcij", interpolation(3), interpolation(5), x)
    expected = torch.einsum("oc,bcij->boij", skip.convolution.effective_weight().flatten(1), doubled)
    assert skip.convolution.bias is None
    torch.testing.assert_close(skip(x), expected)
