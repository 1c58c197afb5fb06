"""Normal latents in one pass each way, of nvae/kernels/latents.py: values and gradients are PyTorch's in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nvae.bricks import latents
from nvae.bricks.latents import Normal
from nvae.kernels import latents as passes

SHAPE = (3, 4, 5, 2)


pytestmark = pytest.mark.usefixtures("passes_of_any_size")


def assert_same(plain: Callable[..., Any], fast: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Results, and gradients of a random sum of all of them."""
    inputs = [leaf.requires_grad_() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    found, expected = fast(*args), plain(*args)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-12, atol=1e-12)
    cotangents = [torch.randn_like(output) for output in expected]
    gradients = [torch.autograd.grad(outputs, inputs, cotangents) for outputs in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2])
def test_parameters_are_pytorchs(count: int) -> None:
    raws = tuple(3 * torch.randn(SHAPE, dtype=torch.float64) for _ in range(count))
    assert_same(latents.bounded_normal.plain, passes.bounded_normal, (raws, 0.7))


def test_parameters_without_a_bound_are_pytorchs() -> None:
    raw = torch.randn(SHAPE, dtype=torch.float64)
    assert_same(latents.log_sigma_normal.plain, passes.log_sigma_normal, (raw, 0.7))


def test_gradients_of_parameters_are_channels_last_where_those_of_the_normal_are() -> None:
    """Others would be copied before each convolution's backward pass."""
    raw = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    raw.register_hook(lambda grad: layouts.append(grad.is_contiguous(memory_format=torch.channels_last)))
    layouts: list[bool] = []
    mean, sigma = passes.log_sigma_normal(raw, 1.0)
    (mean * sigma).sum().backward()
    assert layouts == [True]


@pytest.mark.parametrize("closed", [True, False])
def test_scores_are_pytorchs(closed: bool) -> None:
    q_mean, p_mean, drawn, z = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(4))
    q_sigma, p_sigma = (torch.rand(SHAPE, dtype=torch.float64) + 0.1 for _ in range(2))
    args = Normal(q_mean, q_sigma), Normal(p_mean, p_sigma), drawn, z, closed
    assert_same(latents.score_terms.plain, passes.score_terms, args)


@pytest.mark.parametrize("closed", [True, False])
def test_scores_of_one_draw_are_pytorchs(closed: bool) -> None:
    """Without a flow both densities are of the same z."""
    mean, sigma, z = torch.randn(2, *SHAPE).double(), torch.rand(2, *SHAPE).double() + 0.1, torch.randn(SHAPE).double()

    def scored(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda mean, sigma, z: function(Normal(mean[0], sigma[0]), Normal(mean[1], sigma[1]), z, z, closed)

    assert_same(scored(latents.score_terms.plain), scored(passes.score_terms), (mean, sigma, z))


def test_raw_parameters_get_gradients_of_their_own_type() -> None:
    half, single = torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True), torch.randn(SHAPE, requires_grad=True)
    sum(output.sum() for output in passes.bounded_normal((half, single), 1.0)).backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    assert single.grad is not None and single.grad.dtype == torch.float32


def test_draws_of_fewer_images_are_left_to_others() -> None:
    raws = torch.randn(4, 2, 3, 3), torch.randn(2, 2, 3, 3)
    assert passes.bounded_normal(raws, 1.0) is NotImplemented
