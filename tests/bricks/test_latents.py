"""Normals of the latents against torch.distributions."""

import math

import pytest
import torch

from nvae.bricks.latents import Normal, kl_divergence, soft_clamp
from nvae.core.precision import at_least_float32

SHAPE = (2, 3, 4, 4)


def random_normal() -> Normal:
    return Normal.from_raw(torch.randn(2, 6, 4, 4, dtype=torch.float64) * 3)


def test_the_soft_clamp_is_the_identity_near_zero() -> None:
    u = torch.tensor([-1e-3, 0.0, 1e-3])
    torch.testing.assert_close(soft_clamp(u), u, rtol=1e-6, atol=0)


def test_the_soft_clamp_never_passes_five() -> None:
    assert soft_clamp(torch.tensor([-1e30, -5.0, 5.0, 1e30])).abs().max() <= 5
    assert float(soft_clamp(torch.tensor(5.0))) == pytest.approx(5 * math.tanh(1))


def test_raw_parameters_are_means_then_log_sigmas() -> None:
    raw = torch.randn(2, 6, 4, 4)
    normal = Normal.from_raw(raw)
    torch.testing.assert_close(normal.mean, 5 * torch.tanh(raw[:, :3] / 5))
    torch.testing.assert_close(normal.sigma, torch.exp(5 * torch.tanh(raw[:, 3:] / 5)) + 0.01)


def test_raw_zeros_have_sigma_1_01() -> None:
    normal = Normal.from_raw(torch.zeros(1, 2, 1, 1))
    assert float(normal.mean) == 0
    assert float(normal.sigma) == pytest.approx(1.01)


def test_the_temperature_multiplies_the_whole_sigma() -> None:
    raw = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(Normal.from_raw(raw, 0.7).sigma, 0.7 * Normal.from_raw(raw).sigma)
    torch.testing.assert_close(Normal.from_log_sigma(raw, 0.7).sigma, 0.7 * raw[:, 3:].exp())


def test_log_sigmas_without_clamp_are_unbounded() -> None:
    raw = torch.tensor([7.0, -20.0]).reshape(1, 2, 1, 1)
    normal = Normal.from_log_sigma(raw)
    assert float(normal.mean) == 7
    assert float(normal.sigma) == pytest.approx(math.exp(-20))


def test_log_density_is_that_of_torch() -> None:
    normal, z = random_normal(), torch.randn(SHAPE, dtype=torch.float64)
    expected = torch.distributions.Normal(normal.mean, normal.sigma).log_prob(z)
    torch.testing.assert_close(normal.log_prob(z), expected)


def test_divergence_is_that_of_torch() -> None:
    q, p = random_normal(), random_normal()
    of = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(of(q.mean, q.sigma), of(p.mean, p.sigma))
    torch.testing.assert_close(kl_divergence(q, p), expected)


def test_divergence_is_the_mean_of_the_log_ratio_of_draws() -> None:
    q = Normal(torch.tensor(0.3), torch.tensor(0.6))
    p = Normal(torch.tensor(-0.4), torch.tensor(1.1))
    z = q.draw(torch.randn(200_000))
    ratio = q.log_prob(z) - p.log_prob(z)
    assert float(kl_divergence(q, p)) == pytest.approx(float(ratio.mean()), abs=4 * float(ratio.std()) / 200_000**0.5)


def test_a_normal_does_not_diverge_from_itself() -> None:
    q = random_normal()
    assert kl_divergence(q, q).abs().max() < 1e-15


def test_noise_and_draw_are_inverse() -> None:
    normal, noise = random_normal(), torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(normal.noise_of(normal.draw(noise)), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_everything_is_computed_in_float32_or_more(given: torch.dtype, computed: torch.dtype) -> None:
    raw = torch.zeros(1, 2, 1, 1, dtype=given)
    assert at_least_float32(raw).dtype == computed
    assert Normal.from_raw(raw).sigma.dtype == computed
