"""The end of a residual cell against its formula: values, gradients, types, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.bricks.normalisation import BatchNorm
from nvae.bricks.squeeze_excite import SqueezeExcite

SHAPE = (3, 32, 4, 5)


def plain(layer: SqueezeExcite, skip: Tensor, x: Tensor, norm: BatchNorm | None) -> Tensor:
    """The formula, operator by operator."""
    if norm is not None:
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    hidden = (pooled @ layer.squeeze.weight.T + layer.squeeze.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ layer.excite.weight.T + layer.excite.bias)))
    return skip + 0.1 * x * gate[:, :, None, None]


def parts(with_norm: bool, shape: tuple[int, ...] = SHAPE) -> tuple[SqueezeExcite, BatchNorm | None, Tensor, Tensor]:
    """In float64: the layer, a batch norm that is not the identity, a skip and an x far from zero."""
    layer = SqueezeExcite(shape[1]).double()
    norm = BatchNorm(shape[1]).double() if with_norm else None
    if norm is not None:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    skip, x = (torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in range(2))
    return layer, norm, skip, x


@pytest.mark.parametrize("with_norm", [False, True])
def test_values_and_gradients_are_those_of_the_formula(with_norm: bool) -> None:
    layer, norm, skip, x = parts(with_norm)
    inputs = [skip, x, *layer.parameters(), *([] if norm is None else norm.parameters())]
    ours, formula = layer(skip, x + 3, norm), plain(layer, skip, x + 3, norm)
    torch.testing.assert_close(ours, formula)
    direction = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(formula, inputs, direction)
    )


@pytest.mark.parametrize("with_norm", [False, True])
def test_the_fused_passes_compute_the_formula_too(with_norm: bool) -> None:
    layer, norm, skip, x = parts(with_norm, shape=(4, 64, 16, 17))  # large enough to be compiled
    formula = plain(layer, skip, x, norm)
    wanted = torch.autograd.grad(formula.square().sum(), [skip, x, *layer.parameters()])
    ours = layer(skip, x, norm)
    torch.testing.assert_close(ours, formula)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), [skip, x, *layer.parameters()]), wanted)


def test_in_evaluation_the_running_statistics_count() -> None:
    layer, norm, skip, x = parts(with_norm=True)
    assert norm is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    torch.testing.assert_close(layer(skip, x, norm.eval()), plain(layer, skip, norm(x), None))


@pytest.mark.parametrize("wide_skip", [False, True])
def test_under_autocast_the_wider_type_of_skip_and_branch_stays(wide_skip: bool) -> None:
    layer, skip, x = SqueezeExcite(32), torch.randn(SHAPE), torch.randn(SHAPE).bfloat16()
    skip = (skip if wide_skip else skip.bfloat16()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(skip, x.requires_grad_())
    assert y.dtype == skip.dtype
    torch.testing.assert_close(y.float(), plain(layer, skip.float(), x.float(), None), atol=1e-2, rtol=1e-2)
    y.float().sum().backward()
    assert (skip.grad.dtype, x.grad.dtype) == (skip.dtype, x.dtype)  # type: ignore[union-attr]


def test_only_the_branch_is_kept_for_the_backward_pass() -> None:
    layer, norm, skip, x = parts(with_norm=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(skip, x * 1, norm)
    assert sum(tensor.shape == SHAPE for tensor in kept) == 1


@pytest.mark.parametrize(("channels", "hidden"), [(16, 4), (64, 4), (80, 5), (256, 16)])
def test_the_hidden_width_is_a_sixteenth_and_at_least_four(channels: int, hidden: int) -> None:
    assert SqueezeExcite(channels).squeeze.weight.shape == (hidden, channels)
