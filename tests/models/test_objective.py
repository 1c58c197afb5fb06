"""Warm-up, annealing, balancing and bounds against their closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from nvae.bricks.latents import importance_weighted_bound
from nvae.evaluation.figures import bits_per_dim
from nvae.models.nvae.objective import (
    ObjectiveConfig,
    balance_factors,
    balance_weights,
    balanced_kl,
    kl_coefficient,
    spectral_weight,
)

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- warm-up


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0001),
        (1, 0.0001),
        (100, (100 - 1) / 3000),
        (1501, 0.5),
        (3000, (3000 - 1) / 3000),
        (3001, 1.0),
        (9999, 1.0),
    ],
)
def test_the_kl_coefficient_is_that_of_the_spec(step: int, expected: float) -> None:
    """clip((step − 0.0001·T) / (0.3·T), 0.0001, 1) with T = 10 000."""
    assert kl_coefficient(step / 10_000, ObjectiveConfig()) == pytest.approx(expected)


def test_without_warm_up_the_coefficient_is_one() -> None:
    assert kl_coefficient(0.0, ObjectiveConfig(kl_warmup=0)) == 1


def test_the_coefficient_never_falls() -> None:
    values = [kl_coefficient(i / 1000, ObjectiveConfig()) for i in range(1001)]
    assert values == sorted(values)
    assert values[-1] == 1


def test_the_smallest_coefficient_can_be_chosen() -> None:
    assert kl_coefficient(0.0, ObjectiveConfig(kl_min=0.2)) == 0.2


# -------------------------------------------------------------------------------------------------------- annealing


@pytest.mark.parametrize("coefficient", [0.0001, 0.5, 1.0])
def test_a_fixed_lambda_stays(coefficient: float) -> None:
    assert spectral_weight(coefficient, ObjectiveConfig(spectral=0.02)) == 0.02


@pytest.mark.parametrize(("coefficient", "expected"), [(0.0, 1.0), (0.5, 0.1), (1.0, 0.01)])
def test_an_annealed_lambda_moves_geometrically(coefficient: float, expected: float) -> None:
    config = ObjectiveConfig(spectral=1e-2, spectral_start=1.0)
    assert spectral_weight(coefficient, config) == pytest.approx(expected)


def test_annealing_is_the_formula_of_the_spec() -> None:
    config = ObjectiveConfig(spectral=0.1, spectral_start=3.0)
    expected = math.exp(0.7 * math.log(3.0) + 0.3 * math.log(0.1))
    assert spectral_weight(0.3, config) == pytest.approx(expected)


def test_lambda_zero_is_off_even_when_annealed() -> None:
    assert spectral_weight(0.5, ObjectiveConfig(spectral=0, spectral_start=1.0)) == 0


# -------------------------------------------------------------------------------------------------------- balancing


def test_factors_grow_fourfold_a_scale_over_its_number_of_groups() -> None:
    """α = (2^s)²/n_s: 1/2, 4/3, 16/1, over the smallest."""
    factors = balance_factors([0, 0, 1, 1, 1, 2], CPU)
    expected = torch.tensor([0.5, 0.5, 4 / 3, 4 / 3, 4 / 3, 16.0]) / 0.5
    torch.testing.assert_close(factors, expected)


def test_one_scale_is_balanced_by_kl_alone() -> None:
    assert balance_factors([0] * 7, CPU).tolist() == [1] * 7


def test_weights_are_those_of_the_spec() -> None:
    kl, factors = torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, 0.0]]), torch.tensor([1.0, 2.0, 8.0])
    size = np.array([2.01, 3.01, 0.01])  # means of |KL| over the batch, plus 0.01
    raw = size / np.array([1.0, 2.0, 8.0]) * size.sum()
    expected = torch.from_numpy(raw / raw.mean()).float()
    torch.testing.assert_close(balance_weights(kl, factors), expected)


def test_weights_have_mean_one_and_no_gradient() -> None:
    kl = torch.rand(4, 6, requires_grad=True)
    weights = balance_weights(kl, balance_factors([0, 0, 1, 1, 1, 1], CPU))
    assert float(weights.mean()) == pytest.approx(1)
    assert not weights.requires_grad


def test_a_group_without_kl_keeps_a_small_weight() -> None:
    weights = balance_weights(torch.tensor([[0.0, 5.0]]), torch.ones(2))
    assert weights[0] > 0


def test_below_one_the_kl_is_weighted_and_scaled() -> None:
    kl, weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, 1.5])
    torch.testing.assert_close(balanced_kl(kl, 0.2, weights), 0.2 * torch.tensor([3.5, 7.5]))


def test_from_one_on_the_kl_is_a_plain_sum() -> None:
    kl = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert balanced_kl(kl, 1.0, torch.tensor([0.5, 1.5])).tolist() == [3, 7]


def test_without_weights_the_kl_is_only_scaled() -> None:
    torch.testing.assert_close(balanced_kl(torch.tensor([[1.0, 2.0]]), 0.5, None), torch.tensor([1.5]))


# ----------------------------------------------------------------------------------------------------------- bounds


def test_the_bound_is_the_log_of_the_mean_weight() -> None:
    weights = torch.randn(1000, 5) * 8 - 3000
    expected = logsumexp(weights.double().numpy(), axis=0) - math.log(1000)
    torch.testing.assert_close(
        importance_weighted_bound(weights).double(), torch.from_numpy(expected), rtol=1e-6, atol=0
    )


def test_one_sample_is_the_evidence_lower_bound() -> None:
    weights = torch.randn(1, 5)
    torch.testing.assert_close(importance_weighted_bound(weights), weights[0])


def test_a_sample_of_weight_zero_counts_as_a_sample() -> None:
    weights = torch.tensor([[0.0], [-torch.inf]])
    assert float(importance_weighted_bound(weights)) == pytest.approx(math.log(0.5))


def linear_gaussian_weights(samples: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, B) log weights and (B,) exact log-likelihoods of z ~ N(0, 1), x | z ~ N(2z, 0.5²); the posterior is off.

    x ~ N(0, 4 + 0.25). The exact posterior is N(8x/17, 1/17).
    """
    normal = torch.distributions.Normal
    zero, one = torch.zeros(()).double(), torch.ones(()).double()
    z = torch.randn(images).double()
    x = 2 * z + 0.5 * torch.randn(images).double()
    q = normal(8 * x / 17 + 0.1, 1.4 / 17**0.5)
    draws = q.sample((samples,))
    weights = normal(2 * draws, 0.5).log_prob(x) + normal(zero, one).log_prob(draws) - q.log_prob(draws)
    return weights, normal(zero, 4.25**0.5).log_prob(x)


def test_the_bound_tightens_to_the_likelihood_of_a_linear_gaussian() -> None:
    weights, exact = linear_gaussian_weights(4096, 400)
    gaps = []
    for k in (1, 8, 64, 4096):
        bounds = importance_weighted_bound(weights.reshape(k, -1, 400).flatten(1)).reshape(-1, 400)
        gaps.append(float((exact - bounds).mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert abs(gaps[-1]) < 1e-3


def test_the_mean_weight_is_the_likelihood() -> None:
    """Unbiased: E_q exp(log weight) = p(x)."""
    weights, exact = linear_gaussian_weights(100_000, 5)
    ratio = (weights - exact).exp()
    error = 4 * ratio.std(0) / 100_000**0.5
    assert ((ratio.mean(0) - 1).abs() < error).all()


def test_bits_per_dim_of_a_fair_coin_is_one() -> None:
    assert bits_per_dim(784 * math.log(2), 784) == pytest.approx(1)
