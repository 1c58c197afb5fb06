"""Activations and their slopes against autograd and their formulas."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.kernels.activations import ACTIVATIONS, Activation, with_slope

EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
FORMULAS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "swish": lambda u: u / (1 + torch.exp(-u)),
    "elu": lambda u: torch.where(u > 0, u, u.exp() - 1),
    "elu_elu": lambda u: F.elu(F.elu(u)),
    "gelu": lambda u: u * torch.special.ndtr(u),
}
# Around the kink, and far on both sides of it.
POINTS = torch.cat([torch.linspace(-6, 6, 97), torch.tensor([-90.0, -30.0, -1e-6, 1e-6, 30.0, 90.0])]).double()


@EVERY_ACTIVATION
def test_an_activation_is_its_formula(activation: Activation) -> None:
    torch.testing.assert_close(ACTIVATIONS[activation](POINTS), FORMULAS[activation](POINTS))


@EVERY_ACTIVATION
def test_the_value_beside_the_slope_is_the_activation(activation: Activation) -> None:
    torch.testing.assert_close(with_slope(activation, POINTS)[0], ACTIVATIONS[activation](POINTS))


@EVERY_ACTIVATION
def test_in_float32_value_and_slope_err_by_a_few_roundings(activation: Activation) -> None:
    u = torch.linspace(-20, 20, 40_001).double()
    for found, expected in zip(with_slope(activation, u.float()), with_slope(activation, u), strict=True):
        assert float(((found - expected).abs() / expected.abs().clamp(min=1)).max()) < 1e-6


@EVERY_ACTIVATION
def test_the_slope_is_the_derivative(activation: Activation) -> None:
    u = POINTS.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(FORMULAS[activation](u).sum(), u)
    torch.testing.assert_close(with_slope(activation, POINTS)[1], derivative)


@EVERY_ACTIVATION
@pytest.mark.parametrize("u", [-1e30, -1e4, 1e4, 1e30])
def test_far_out_value_and_slope_are_finite(activation: Activation, u: float) -> None:
    y, slope = with_slope(activation, torch.tensor(u))
    assert y.isfinite()
    assert slope.isfinite()
