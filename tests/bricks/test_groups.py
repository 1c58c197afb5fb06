"""A group of latents: what it draws, scores and lets into the decoder's state."""

import pytest
import torch
from torch import Tensor

from nvae.bricks.cells import BN_SWISH, Separable
from nvae.bricks.groups import LatentGroup, Tower
from nvae.bricks.inference import FoldedGroup
from nvae.bricks.latents import kl_divergence


def group(*, first: bool = False, flows: int = 0, residual: bool = True) -> LatentGroup:
    """Of 3 latent channels, between towers of 6 and 8 channels, in eval mode."""
    towers = Tower((BN_SWISH,), 6, 1), Tower((Separable(expansion=2),), 8, 0 if first else 1)
    options = {"squeeze_excite": True, "residual_posterior": residual, "first": first, "vanilla": False}
    return LatentGroup(*towers, 3, flows=flows, **options).double().eval()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """A state, a tap and noise for 2 images of 4×4 latents."""
    shapes = (2, 8, 4, 4), (2, 6, 4, 4), (2, 3, 4, 4)
    state, tap, noise = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return state, tap, noise


@pytest.mark.parametrize("flows", [0, 2])
def test_a_given_latent_is_scored_as_the_draw_that_it_was(flows: int, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    state, tap, noise = inputs
    one = group(flows=flows)
    drawn = one(state, tap, noise, None)
    given = one(state, tap, torch.full_like(noise, torch.nan), drawn.z)
    assert torch.equal(given.state, drawn.state)
    for ours, theirs in zip(given.score, drawn.score, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_first_group_has_a_fixed_prior(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    state, tap, noise = inputs
    prior = group(first=True)(state, tap, noise, None).prior
    assert prior.mean.shape == noise.shape and not prior.mean.any()
    assert (prior.sigma == 1.01).all()


@pytest.mark.parametrize("residual", [True, False])
def test_a_residual_posterior_is_the_prior_s_raw_parameters_and_its_own(
    residual: bool, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    state, tap, _ = inputs
    one = group(residual=residual)
    raw = one.prior_raw(state)
    own = one.posterior(tap + one.merge(state))
    torch.testing.assert_close(sum(one.posterior_raws(tap, state, raw)), raw + own if residual else own)


def test_without_flows_the_kl_is_that_of_its_normals(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    drawn = group()(*inputs, None)
    expected = kl_divergence(drawn.posterior, drawn.prior).sum((2, 3))
    torch.testing.assert_close(drawn.score.channel_kl, expected)


@pytest.mark.parametrize("first", [False, True])
def test_for_inference_a_group_says_the_same(first: bool, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    state, tap, noise = inputs
    one = group(first=first, flows=1)
    folded = FoldedGroup(one)
    expected, found = one(state, one.seen(tap), noise, None), folded(state, folded.seen(tap), noise, None)
    torch.testing.assert_close(found.state, expected.state)
    for ours, theirs in zip(found.score, expected.score, strict=True):
        torch.testing.assert_close(ours, theirs)
