"""Normal latents on their grid: the same everywhere, and at the cost of their KL."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from nvae.bricks.latents import Normal, kl_divergence
from nvae.codec.normals import Grid, bits_needed, power_of_two
from nvae.codec.rounding import Rounding
from nvae.codec.stack import Stack

B, L, SIDE = 2, 3, 16


def normals(spread: float = 1.0, narrower: float = 0.3) -> tuple[Normal, Normal]:
    """A prior and a posterior (B, L, SIDE, SIDE)."""
    shape = (B, L, SIDE, SIDE)
    prior = Normal(3 * torch.randn(shape).double(), (spread * torch.randn(shape)).exp().double())
    shift = torch.randn(shape).double() * prior.sigma
    return prior, Normal(prior.mean + shift, prior.sigma * narrower * (0.2 * torch.randn(shape)).exp().double())


def grid_of(prior: Normal, bits: Sequence[int | None] = (3,) * L) -> Grid:
    return Grid(prior, bits, Rounding(B), 0)


def test_powers_of_two_are_what_they_should_be() -> None:
    exponents = np.arange(-1000, 1000)
    np.testing.assert_allclose(power_of_two(exponents), 2.0 ** (exponents / 64), rtol=1e-15)


def test_the_grid_is_centred_at_the_prior() -> None:
    prior, _ = normals()
    values = grid_of(prior).values(np.zeros((B, L * SIDE**2), dtype=np.int64))
    assert ((values - prior.mean).abs() <= prior.sigma / 2**3 * 0.51).all()


def test_a_prior_has_two_to_the_b_steps_to_its_sigma() -> None:
    prior, _ = normals()
    step = torch.from_numpy(np.ldexp(1.0, grid_of(prior).exponent)).reshape(prior.sigma.shape)
    ratio = prior.sigma / step
    assert ratio.min() >= 2**3 * 0.99
    assert ratio.max() <= 2**4 * 1.01


def test_latents_are_exact_multiples_of_a_power_of_two() -> None:
    prior, _ = normals()
    grid = grid_of(prior)
    values = grid.values(np.full((B, L * SIDE**2), 5)).reshape(B, -1).numpy()
    steps = np.ldexp(values, -grid.exponent)
    np.testing.assert_array_equal(steps, np.round(steps))


@pytest.mark.parametrize("narrower", [1.0, 0.3, 0.02])
def test_posteriors_cost_their_divergence(narrower: float) -> None:
    prior, q = normals(narrower=narrower)
    rounding = Rounding(B)
    grid = Grid(prior, bits_needed(q, prior), rounding, 0)
    coded = grid.posterior(q, rounding)
    stacks = [Stack.new(f"{seed}", 2000) for seed in range(B)]
    cost = 0.0
    for b, stack in enumerate(stacks):
        before = stack.bits
        integers = stack.pop(grid.model, *coded.of(b, grid.tells))
        stack.push(integers, grid.model, *grid.prior.of(b, grid.tells))
        cost += stack.bits - before
    divergence = kl_divergence(q, prior).sum().item() / math.log(2)
    noise = 3 * math.sqrt(B * L * SIDE**2)  # of a draw: log q − log p has a deviation of about a nat
    assert abs(cost - divergence) < noise


def test_finer_grids_are_for_narrower_posteriors() -> None:
    found = [bits_needed(q, prior)[0] for prior, q in (normals(narrower=narrower) for narrower in (1.0, 0.1, 0.01))]
    assert found == sorted(set(found))


def test_channels_that_are_as_their_prior_say_nothing() -> None:
    prior, q = normals()
    q.mean[:, 1], q.sigma[:, 1] = prior.mean[:, 1], prior.sigma[:, 1]
    bits = bits_needed(q, prior)
    assert [b is None for b in bits] == [False, True, False]
    assert grid_of(prior, bits).tells.reshape(L, -1).all(1).tolist() == [True, False, True]


def test_a_posterior_beyond_the_grid_is_coded_at_its_end() -> None:
    prior = Normal(torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double())
    far = Normal(torch.full((1, 1, 1, 1), 1e9).double(), torch.ones(1, 1, 1, 1).double())
    rounding = Rounding(1)
    grid = Grid(prior, [3], rounding, 0)
    drawn = Stack.new("0", 50).pop(grid.model, *grid.posterior(far, rounding).of(0, grid.tells))
    assert drawn.item() <= grid.furthest
